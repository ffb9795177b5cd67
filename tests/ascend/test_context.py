"""V5 of dispatch and combine, with a context in place of names, gives the reference's bits; contexts that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.ascend import aclnn
from evenmoe.ascend.context import DEFAULT_BUFFER_BYTES, buffer_address, group_of, make_context, write_context
from evenmoe.ascend.executor import stage_one
from evenmoe.contract.dispatch import check_dispatch_call, infer_dispatch
from evenmoe.contract.limits import RELAXED
from evenmoe.errors import ConstraintError, EvenmoeError, LostRankError, MissingArgumentError, UnsupportedTypeError
from evenmoe.ops.operator import CALL_TYPES, specs_of
from evenmoe.transport.world import Rank
from tests.ascend.calls import CHAINS, UNTOUCHED, Chain, pick
from tests.ascend.test_executor import check_chain, run_chain
from tests.patience import HANG_S
from tests.worlds import CONST_EXPERTS, Case, Lent, Spec, assert_same_bits, outputs_of, run_reference, specs

V5 = {
    "update_expert": "MoeUpdateExpert",
    "dispatch": "MoeDistributeDispatchV5",
    "combine": "MoeDistributeCombineV5",
    "combine_add_rms_norm": "MoeDistributeCombineAddRmsNormV2",
}


@pytest.mark.parametrize("name", [name for name, chain in CHAINS.items() if chain.tp == 0])
def test_it_writes_what_the_functions_with_names_write(name):
    check_chain(CHAINS[name], run_chain(CHAINS[name], V5))


def run_rank(rank: Rank, case: Case) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Dispatch's outputs and combine's, by the two-stage functions."""
    spec, i = case.spec, rank.index
    if not case.present[i]:
        return None
    lent = Lent(case, i)
    sizes = dict(case.sizes)
    shared = {
        "context": lent(make_context(rank.ep.name, rank.ep.rank, spec.ep)),
        "ccl_buffer_size": 0,
        "ep_world_size": spec.ep,
        "ep_rank_id": rank.ep.rank,
        "moe_expert_num": sizes.pop("num_experts"),
        "tp_world_size": 0,
        "tp_rank_id": 0,
        "expert_shard_type": 0,
        "comm_alg": "",
        "quant_mode": spec.quant_mode,
        "comm_quant_mode": spec.comm_quant_mode,
        "expert_token_nums_type": spec.nums_type,
        "out_dtype": 0,
        "group_list_type": 0,
        "expert_ids": lent.mine(case.ids),
        "x_active_mask": lent.mine(case.masks),
        "elastic_info": lent(case.elastic_info),
        **sizes,
    }
    given = shared | {"x": lent.mine(case.x), "scales": lent(case.scales), "expert_scales": lent.mine(case.gates)}
    names = {field for field in CALL_TYPES["dispatch"].__dataclass_fields__ if field in given}
    call = CALL_TYPES["dispatch"](
        **{name: given[name] for name in names}, group_ep="to know the outputs", limits=RELAXED
    )
    allocated = infer_dispatch(check_dispatch_call(specs_of(call)), str(case.dtype).split(".")[1], spec.quant_mode)
    out = {name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for name, s in allocated.items()}
    stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", given | out), RELAXED).run()
    back = {
        "expand_x": lent(case.expert_out(i, len(out["expand_x"]))),
        "assist_info_for_combine": out["assist_info_for_combine"],
        "ep_send_counts": out["ep_recv_counts"],
        "expert_scales": lent.mine(case.weights),
        "shared_expert_x": lent.mine(case.shared_x),
        "ori_x": lent.mine(case.ori_x),
        **dict(zip(CONST_EXPERTS, map(lent, case.const), strict=True)),
        "x_out": torch.zeros((case.num_tokens[i], spec.hidden), dtype=case.dtype),
    }
    stage_one("MoeDistributeCombineV5", pick("MoeDistributeCombineV5", shared | back), RELAXED).run()
    lent.take_back()
    return list(out.values()), back["x_out"]


def in_process(rank: Rank, spec: Spec) -> tuple | None:
    return run_rank(rank, Case(spec))


def assert_equal(results: list, expected: list) -> None:
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert (got is None) == (want is None), index
        if got is None:
            continue
        for (name, theirs), ours in zip(outputs_of(want[0]).items(), got[0], strict=True):
            assert_same_bits(ours, theirs, f"dispatch's {name} on rank {index}")
        assert_same_bits(got[1], want[1], f"combine's y on rank {index}")


@settings(max_examples=100, deadline=None)
@given(st.one_of(specs(tp=0), specs(tp=0, elastic=True)))
def test_threads(spec):
    case = Case(spec)
    with em.local_world(spec.ep, timeout_s=60.0) as world:
        results = world.run(lambda rank: run_rank(rank, case))
    assert_equal(results, run_reference(Case(spec)))


@settings(max_examples=30, deadline=None)
@given(specs(ep=4, tp=0))
def test_processes(processes, spec):
    assert_equal(processes.run((4, 1), in_process, spec), run_reference(Case(spec)))


def test_a_context_is_read_when_the_call_runs_and_may_change_until_then():
    """As on the chip: a program may copy the context to the device behind its first stage."""
    chain = Chain()

    def late(rank, other):
        values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
        values["context"] = torch.zeros(4100, dtype=torch.int32)
        executor = stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", values))
        assert executor.groups == [(None, rank.index, 2)]
        assert executor.describe() == f"aclnnMoeDistributeDispatchV5 as rank {rank.index} of the group of its context"
        write_context(values["context"], other.ranks[rank.index].ep.name, rank.index, 2)
        executor.run()
        return executor.groups[0][0]

    with em.local_world(2, timeout_s=HANG_S) as world, em.local_world(2, timeout_s=HANG_S) as other:
        assert set(world.run(lambda rank: late(rank, other))) == {other.ranks[0].ep.name}


def test_ranks_of_different_groups_wait_for_one_another_in_vain():
    chain = Chain()

    def call(rank, name):
        values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
        write_context(values["context"], name, rank.index, 2)
        stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", values)).run()

    with em.local_world(2, timeout_s=0.3) as one, em.local_world(2, timeout_s=0.3) as two:
        names = [one.ranks[0].ep.name, two.ranks[0].ep.name]
        with pytest.raises(LostRankError):
            one.run(lambda rank: call(rank, names[rank.index]))


@pytest.fixture
def rank():
    with em.local_world(2) as world:
        yield world.ranks[0]


CLOSED = make_context("a group that is closed", 0, 2)
FIX = "write it as CommContextManager.create_context does, or from HcclGetHcclBuffer's address."


@pytest.mark.parametrize(
    ("context", "error", "text"),
    [
        (None, MissingArgumentError, f"`context` is None: it must be given; {FIX}"),
        (torch.zeros(4100), UnsupportedTypeError, "`context` is float32 (4100,): it must be int32;"),
        (torch.zeros((1, 9), dtype=torch.int32), ConstraintError, "`context` is int32 (1, 9): it must be 1-D, (num"),
    ],
)
def test_the_first_stage_says_what_is_no_context(rank, context, error, text):
    values = Chain().inputs(rank) | Chain().attributes(rank) | Chain().outputs(rank) | {"context": context}
    with pytest.raises(error) as raised:
        stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", values))
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (
            torch.zeros(4, dtype=torch.int32),
            f"`context` is of 4 numbers: it must have 6 or more for rank=0; {FIX}",
        ),
        (
            torch.zeros(6, dtype=torch.int32),
            "`context` is 0 where the buffer of rank 0 should be: it must hold the address of a communication buffer "
            f"of a group of this process; {FIX}",
        ),
        (
            make_context("a group that is closed", 1, 2),
            "`context` is of rank 1: it must be of ep_rank_id, 0; write one on each rank.",
        ),
        (
            CLOSED,
            "`group_ep` is 'a group that is closed' (rank 0): it must name an open group that this rank belongs to;",
        ),
    ],
)
def test_the_run_says_what_is_no_context(rank, context, text):
    values = Chain().inputs(rank) | Chain().attributes(rank) | Chain().outputs(rank) | {"context": context}
    executor = stage_one("MoeDistributeDispatchV5", pick("MoeDistributeDispatchV5", values))
    with pytest.raises(EvenmoeError) as raised:
        executor.run()
    assert str(raised.value).startswith(text)
    assert (values["expand_x"] == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"ccl_buffer_size": -1},
            "`ccl_buffer_size` is -1: it must be 0, or more than the 1048576 bytes of the states;",
        ),
        ({"ccl_buffer_size": 1 << 20}, "`ccl_buffer_size` is 1048576: it must be 0, or more than the 1048576 bytes"),
        (
            {"ccl_buffer_size": (1 << 20) + 100},
            "`ccl_buffer_size` is 1048676, so 100 without the states: it must be at least 86016 for the EP group; "
            "use HCCL_BUFFSIZE 1 (MB) or more.",
        ),
        ({"comm_alg": "hierarchy"}, "`comm_alg` is hierarchy: it must not be hierarchy, which takes groups by name;"),
        ({"tp_world_size": 2}, "`tp_world_size` is 2: it must be 0 to 1; use 0 for no TP."),
    ],
)
@pytest.mark.parametrize("operator", ["MoeDistributeDispatchV5", "MoeDistributeCombineV5"])
def test_what_the_functions_with_a_context_do_not_take(rank, operator, changes, text):
    chain = Chain()
    out = chain.outputs(rank)
    values = chain.inputs(rank) | chain.attributes(rank) | out
    values |= {"x_out": chain.x_out(with_norm=False), "ep_send_counts": out["ep_recv_counts"]}
    if "Combine" in operator:
        values["expand_scales"] = None
    stage_one(operator, pick(operator, values | {"ccl_buffer_size": DEFAULT_BUFFER_BYTES}))
    with pytest.raises(EvenmoeError) as raised:
        stage_one(operator, pick(operator, values | changes))
    assert str(raised.value).startswith(text)


def test_the_window_is_the_buffer_less_one_mebibyte(rank):
    """Upstream's formula (§2.2) for 3 tokens of 1024, 2 experts of each of 2 ranks, K = 2: 2·3·(2560·4 + 2048·2)."""
    values = Chain().inputs(rank) | Chain().attributes(rank) | Chain().outputs(rank)
    need = 2 * 3 * (2560 * 2 * 2 + 2048 * 2)
    for size, status in (((1 << 20) + need, 0), ((1 << 20) + need - 1, 561002)):
        call = pick("MoeDistributeDispatchV5", values | {"ccl_buffer_size": size})
        assert aclnn.aclnnMoeDistributeDispatchV5GetWorkspaceSize(*call.values())[0] == status


@settings(deadline=None)
@given(st.integers(2, 768), st.data())
def test_every_rank_of_every_group_has_an_address_of_its_own(world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    context = make_context(f"group of {world_size}", rank, world_size)
    assert group_of(context, rank) == f"group of {world_size}"
    addresses = context[4 : 4 + 2 * world_size].view(torch.int64).tolist()
    assert len(set(addresses)) == world_size
    assert addresses[rank] == buffer_address(f"group of {world_size}", rank)
    with pytest.raises(ConstraintError):
        group_of(context, (rank + 1) % world_size)
