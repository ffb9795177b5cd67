"""CommContextManager: its contexts serve V5, in processes by the group's name; its signature; what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch

import evenmoe as em
from evenmoe.ascend.cann_ops_transformer import CommContextManager, MoeDistributeBuffer, ops
from evenmoe.ascend.context import group_of
from evenmoe.ascend.executor import stage_one
from evenmoe.ascend.status import NpuCallError
from tests.ascend.calls import Chain, pick
from tests.patience import HANG_S


def test_the_signature_is_the_published_one():
    assert str(inspect.signature(CommContextManager)).partition(" -> ")[0] == (
        "(group: 'str | Transport', worldSize: 'int', backend: 'str | Mapping[str, str]' = 'kfc', "
        "commAlg: 'str' = 'ub-mem', opName: 'str' = 'moe_dispatch_ffn_combine', customCclBufferSize: 'int' = 0)"
    )
    assert ops.CommContextManager is CommContextManager


def dispatched_over(rank, context, size):
    chain = Chain(ep=rank.ep.world_size)
    values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
    values |= {"context": context, "ccl_buffer_size": size}
    stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", values)).run()
    return values["expert_token_nums"].tolist()


def by_name(rank):
    name = rank.ep.name
    manager = CommContextManager(name, 4, backend={"Ascend910_93": "kfc", "Ascend950": "channel"})
    assert manager.ccl_buffer_size == 0
    context = manager.create_context()
    assert (group_of(context, rank.index), manager.ccl_buffer_size) == (name, 2 * 200 << 20)
    manager.destroy()
    return dispatched_over(rank, context, manager.ccl_buffer_size)


def test_a_name_is_enough_where_every_rank_has_a_process(processes):
    counts = processes.run((4, 1), by_name)
    assert sum(map(sum, counts)) == 24  # 3 tokens of 4 ranks, 2 experts each


def test_a_context_is_written_anew_for_another_group():
    def step(rank, other):
        manager = CommContextManager(rank.ep, 2, customCclBufferSize=3 << 20)
        context = manager.create_context()
        manager.update_group(other.ranks[rank.index].ep, context)
        assert group_of(context, rank.index) == other.ranks[rank.index].ep.name
        buffer = MoeDistributeBuffer(rank.ep)
        assert group_of(buffer.context, rank.index) == rank.ep.name
        before = buffer.context
        buffer.update_ctx(other.ranks[rank.index].ep)
        assert group_of(before, rank.index) == other.ranks[rank.index].ep.name
        return dispatched_over(rank, context, manager.ccl_buffer_size)

    with em.local_world(2, timeout_s=HANG_S) as world, em.local_world(2, timeout_s=HANG_S) as other:
        assert sum(map(sum, world.run(lambda rank: step(rank, other)))) == 12


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"group": 3}, "`group` is a int: it must be a group's name; pass get_hccl_comm_name's."),
        ({"group": "nobody"}, "`group` is 'nobody' (rank 0): it must name an open group that this rank belongs to;"),
        ({"worldSize": 3}, "`group` is "),
        ({"backend": "nccl"}, '`backend` is nccl: it must be kfc or channel; use "kfc".'),
        (
            {"backend": {"Ascend950": "kfc"}},
            "`backend` is {'Ascend950': 'kfc'}: it must have an entry for Ascend910_93;",
        ),
        ({"commAlg": "mesh"}, '`commAlg` is mesh: it must be ub-mem or urma; use "ub-mem".'),
        ({"customCclBufferSize": -1}, "`customCclBufferSize` is -1: it must be 0 or more bytes;"),
    ],
)
def test_what_it_refuses(changes, text):
    with em.local_world(2) as world, pytest.raises(NpuCallError) as raised:
        CommContextManager(**({"group": world.ranks[0].ep, "worldSize": 2} | changes))
    assert str(raised.value).startswith(text)


def test_a_name_tells_no_rank_where_all_are_in_one_process():
    with em.local_world(2) as world, pytest.raises(NpuCallError, match="must have one rank in each process"):
        CommContextManager(world.ranks[0].ep.name, 2)


@pytest.mark.parametrize("context", [torch.zeros(4100), torch.zeros(4, dtype=torch.int32), None])
def test_it_writes_only_into_a_context(context):
    with em.local_world(2) as world:
        manager = CommContextManager(world.ranks[0].ep, 2)
        with pytest.raises(NpuCallError, match="`contextTensor` is "):
            manager.update_group(world.ranks[0].ep, context)
