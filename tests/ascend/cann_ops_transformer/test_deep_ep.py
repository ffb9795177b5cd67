"""MoeDistributeBuffer is dispatch and combine of torch_npu behind an object; sizes are upstream's formulas."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.ascend import torch_npu
from evenmoe.ascend.cann_ops_transformer import MoeDistributeBuffer, ops
from evenmoe.ascend.cann_ops_transformer.sizes import elastic_megabytes, low_latency_megabytes
from evenmoe.ascend.torch_npu import NpuCallError
from tests.ascend.calls import CHAINS, Chain
from tests.patience import HANG_S
from tests.worlds import assert_same_bits

#: The published signatures, self left out.
LISTING = {
    "low_latency_dispatch": "x, topk_idx, num_experts, *, quant_mode=0, comm_alg='', x_smooth_scale=None, "
    "x_active_mask=None, topk_weights=None, zero_expert_num=0, copy_expert_num=0, const_expert_num=0, "
    "elastic_info=None, expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, expert_token_nums_type=1, "
    "num_max_dispatch_tokens_per_rank=0, y_dtype=None, x_dtype=None, x_smooth_scales_dtype=None",
    "low_latency_combine": "x, topk_idx, topk_weights, assist_info_for_combine, ep_send_counts, *, num_experts=0, "
    "comm_alg='', comm_quant_mode=0, x_active_mask=None, expand_scales=None, shared_expert_x=None, elastic_info=None, "
    "ori_x=None, const_expert_alpha_1=None, const_expert_alpha_2=None, const_expert_v=None, zero_expert_num=0, "
    "copy_expert_num=0, const_expert_num=0, expert_shared_type=0, shared_expert_num=1, shared_expert_rank_num=0, "
    "num_max_dispatch_tokens_per_rank=0",
    "get_low_latency_ccl_buffer_size": "world_size, num_max_dispatch_tokens_per_rank, hidden, num_moe_expert, topk, "
    "num_shared_expert=0, num_shared_expert_ranks=0, comm_alg=''",
    "update_ctx": "new_group",
}


@pytest.mark.parametrize("name", LISTING)
def test_signatures_are_the_published_ones(name):
    listed = {}
    exec(f"def listed({LISTING[name]}): pass", {}, listed)
    parameters = inspect.signature(getattr(MoeDistributeBuffer, name)).parameters
    ours = [(p.name, p.kind, p.default) for key, p in parameters.items() if key != "self"]
    assert ours == [(p.name, p.kind, p.default) for p in inspect.signature(listed["listed"]).parameters.values()]


def run_chain(rank, chain: Chain):
    """(what the buffer returns, what torch_npu's functions return) for the same call."""
    given, attributes = chain.inputs(rank), chain.attributes(rank)
    buffer = MoeDistributeBuffer(rank.ep, ccl_buffer_size=200)
    names = ("elastic_info", "shared_expert_num", "shared_expert_rank_num", "comm_alg")
    shared = {name: attributes[name] for name in names if name in attributes}
    shared |= {f"{kind}_expert_num": attributes[f"{kind}_expert_num"] for kind in ("zero", "copy", "const")}
    shared |= {"x_active_mask": given["x_active_mask"]}
    there = {"quant_mode": chain.quant_mode, "expert_token_nums_type": chain.nums_type}
    weights = given["expert_scales"] if chain.seed % 2 else None
    ours = buffer.low_latency_dispatch(
        given["x"],
        given["expert_ids"],
        chain.num_experts,
        x_smooth_scale=given["scales"],
        topk_weights=weights,
        **shared,
        **there,
    )
    group = (rank.ep.name, chain.ep, rank.ep.rank, chain.num_experts)
    theirs = torch_npu.npu_moe_distribute_dispatch_v2(
        given["x"], given["expert_ids"], *group, scales=given["scales"], expert_scales=weights, **shared, **there
    )
    rows = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(rank.index)).to(chain.dtype)
    back = {key: given[key] for key in ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")}
    back |= {"shared_expert_x": given["shared_expert_x"], "comm_quant_mode": chain.comm_quant_mode}
    y = buffer.low_latency_combine(
        rows,
        given["expert_ids"],
        given["expert_scales"],
        ours[2],
        ours[4],
        num_experts=chain.num_experts,
        **back,
        **shared,
    )
    y_there = torch_npu.npu_moe_distribute_combine_v2(
        rows,
        given["expert_ids"],
        theirs[2],
        theirs[4],
        given["expert_scales"],
        *group,
        tp_send_counts=theirs[5],
        **back,
        **shared,
    )
    return (*ours, y), (*theirs[:5], theirs[6] if weights is not None else theirs[6][:0], y_there)


@pytest.mark.parametrize("name", [name for name, chain in CHAINS.items() if chain.tp < 2])
def test_the_buffer_gives_the_values_of_torch_npu(name):
    chain = CHAINS[name]
    with em.local_world(chain.ep, timeout_s=HANG_S) as world:
        for ours, theirs in world.run(lambda rank: run_chain(rank, chain)):
            for one, other in zip(ours, theirs, strict=True):
                assert_same_bits(one, other, name)


def over_a_process_group(rank):
    """A group that the user made, and another one after update_ctx."""
    group = dist.new_group(list(range(dist.get_world_size())))
    buffer = MoeDistributeBuffer(group)
    x = torch.full((1, 1024), 1.0 + rank.index, dtype=torch.bfloat16)
    ids = torch.tensor([[(rank.index + 1) % 4]], dtype=torch.int32)
    found = []
    for _ in range(2):
        rows, _, assist_info, nums, counts, scales = buffer.low_latency_dispatch(x, ids, 4)
        y = buffer.low_latency_combine(2 * rows, ids, torch.ones(1, 1), assist_info, counts, num_experts=4)
        found.append((rows[0, 0].item(), y[0, 0].item(), nums.tolist(), tuple(scales.shape)))
        assert buffer.update_ctx(dist.new_group(list(range(4)))) is True
    return found


def test_a_group_of_torch_distributed_will_do(processes):
    want = [[(4.0 if r == 0 else float(r), 2.0 * (r + 1), [1], (0,))] * 2 for r in range(4)]
    assert processes.run((4, 1), over_a_process_group) == want


def test_the_buffer_must_have_room():
    x, ids = torch.zeros(512, 8192, dtype=torch.bfloat16), torch.zeros(512, 1, dtype=torch.int32)

    def step(rank):
        needed = MoeDistributeBuffer.get_low_latency_ccl_buffer_size(2, 512, 8192, 2, 1)
        with pytest.raises(NpuCallError) as raised:
            MoeDistributeBuffer(rank.ep, needed - 1).low_latency_dispatch(x, ids, 2)
        enough = MoeDistributeBuffer(rank.ep, needed)
        assert enough.ccl_buffer_size == 2 * needed * 2**20
        enough.low_latency_dispatch(x, ids, 2)
        return raised.value.argument, raised.value.status

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert world.run(step) == [("ccl_buffer_size", 561002)] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"comm_alg": 1}, "`comm_alg` is 1: it must be 0; choose the algorithm at each call, with its comm_alg."),
        (
            {"ccl_buffer_size": -1},
            "`ccl_buffer_size` is -1: it must be 0 or more MB; use get_low_latency_ccl_buffer_size.",
        ),
    ],
)
def test_what_the_buffer_is_made_of(arguments, text):
    with em.local_world(2) as world, pytest.raises(NpuCallError) as raised:
        MoeDistributeBuffer(world.ranks[0].ep, **arguments)
    assert str(raised.value) == text


def test_a_group_of_another_size_is_an_error():
    with em.local_world(2) as two, em.local_world(3) as three:
        buffer = MoeDistributeBuffer(two.ranks[0].ep)
        with pytest.raises(NpuCallError, match="`new_group` is of 3 ranks: it must have 2 ranks, as the first group"):
            buffer.update_ctx(three.ranks[0].ep)


def test_what_combine_must_be_given():
    x, ids = torch.zeros(2, 1024, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)

    def step(rank):
        buffer = MoeDistributeBuffer(rank.ep)
        with pytest.raises(NpuCallError) as raised:
            buffer.low_latency_combine(x, ids, torch.ones(1, 1), None, torch.zeros(2, dtype=torch.int32), num_experts=2)
        return str(raised.value)

    with em.local_world(2, timeout_s=HANG_S) as world:
        texts = world.run(step)
    assert any("`assist_info_for_combine` is None: it must be given; pass dispatch's output." in text for text in texts)


#: Worked out from the published formulas: (arguments, MB).
LOW_LATENCY = [
    ((16, 8, 7168, 32, 8), 5),
    ((16, 8, 7168, 32, 8, 1, 1, "fullmesh_v1"), 6),
    ((2, 512, 8192, 2, 1), 25),
    ((2, 1, 1024, 2, 1), 1),
    ((768, 512, 8192, 768, 16), 6465),
    ((8, 256, 4096, 64, 8, 0, 0, "fullmesh_v2"), 161),
]


@pytest.mark.parametrize(("arguments", "megabytes"), LOW_LATENCY)
def test_the_size_of_the_buffer(arguments, megabytes):
    assert MoeDistributeBuffer.get_low_latency_ccl_buffer_size(*arguments) == megabytes


def test_sizes_out_of_range():
    good = (16, 8, 7168, 32, 8, 0, 0, "")
    for position, wrong in ((0, 1), (1, 513), (2, 1000), (3, 0), (4, 17), (5, 5), (6, 16), (7, "hierarchy")):
        with pytest.raises(ValueError, match="it must be"):
            low_latency_megabytes(*good[:position], wrong, *good[position + 1 :])
    with pytest.raises(ValueError, match="2048"):
        low_latency_megabytes(3, 8, 7168, 1024, 8, 0, 2, "")
    for experts, topk in ((1, 4), (2049, 4), (8, 0), (8, 33)):
        with pytest.raises(ValueError, match="it must be"):
            elastic_megabytes(2, 128, 4096, experts, topk)


def test_upstreams_name_is_there():
    assert ops.MoeDistributeBuffer is MoeDistributeBuffer
