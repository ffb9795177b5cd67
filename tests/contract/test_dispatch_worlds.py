"""Dispatch in whole worlds: the edges of the chip, the demo of the first page, shared ranks, other limits."""

from __future__ import annotations

import pytest

from evenmoe.contract.dispatch import infer_dispatch
from evenmoe.contract.limits import ATLAS_A3, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from tests.contract.checks import check_dispatch

ELASTIC = TensorSpec((20,), "int32")


@pytest.mark.parametrize(
    ("ep", "experts", "tokens", "hidden", "top_k"),
    [
        (2, 2, 1, 1024, 1),
        (768, 768, 512, 8192, 16),
        (8, 1024, 512, 7168, 8),
        (16, 16, 1, 1025, 16),
        (4, 1024, 3, 8192, 16),
    ],
)
def test_the_edges_of_atlas_a3_are_inside(ep, experts, tokens, hidden, top_k):
    layout = check_dispatch(
        x=TensorSpec((tokens, hidden), "float16"),
        expert_ids=TensorSpec((tokens, top_k), "int32"),
        group_ep="ep",
        ep_world_size=ep,
        ep_rank_id=ep - 1,
        moe_expert_num=experts,
    )
    assert layout.capacity == tokens * ep * min(experts // ep, top_k)


def test_full_mesh_v2_is_accepted_at_its_edge():
    layout = check_dispatch(
        x=TensorSpec((256, 1024), "float16"),
        expert_ids=TensorSpec((256, 12), "int32"),
        group_ep="ep",
        ep_world_size=8,
        ep_rank_id=0,
        moe_expert_num=16,
        global_bs=2048,
        comm_alg="fullmesh_v2",
        # §2.2 by hand: td = cdiv(2048 + 44, 480)·512 = 5·512, tc = 2048, 2·(256·2560·8·2 + 256·2048·12).
        hccl_buffer_bytes=2 * (256 * 2560 * 16 + 256 * 2048 * 12),
    )
    assert layout.capacity == 4096


@pytest.mark.parametrize(
    ("hidden", "comm_alg", "sent", "returned"),
    [
        (3104, "", 13 * 512, 13 * 512),  # 2·3104 + 44 = 6252 bytes: 13 blocks of 512
        (3104, "fullmesh_v2", 14 * 512, 13 * 512),  # but 14 when a block carries 480
        (1249, "", 6 * 512, 5 * 512),  # 2498 bytes, rounded up to a multiple of 32, + 44 = 2572
    ],
)
def test_the_buffer_of_each_transport(hidden, comm_alg, sent, returned):
    """Two ranks of one expert, one token each to one expert (§2.2)."""
    call = {
        "x": TensorSpec((1, hidden), "float16"),
        "expert_ids": TensorSpec((1, 1), "int32"),
        "group_ep": "ep",
        "ep_world_size": 2,
        "ep_rank_id": 0,
        "moe_expert_num": 2,
        "comm_alg": comm_alg,
    }
    need = 2 * (sent * 2 + returned)
    check_dispatch(**call, hccl_buffer_bytes=need)
    with pytest.raises(ConstraintError, match=f"at least {need} for the EP group"):
        check_dispatch(**call, hccl_buffer_bytes=need - 1)


# The world of the operator's first page (§7): 8 EP ranks of one expert, two TP ranks, 8 tokens each to 3 experts.
DEMO = {
    "x": TensorSpec((8, 7168), "bfloat16"),
    "expert_ids": TensorSpec((8, 3), "int32"),
    "expert_scales": TensorSpec((8, 3), "float32"),
    "group_ep": "ep",
    "group_tp": "tp",
    "ep_world_size": 8,
    "ep_rank_id": 5,
    "tp_world_size": 2,
    "tp_rank_id": 1,
    "moe_expert_num": 8,
    "shared_expert_num": 0,
    "global_bs": 64,
    "comm_alg": None,
    "expand_x": TensorSpec((128, 7168), "bfloat16"),
    "dynamic_scales": TensorSpec((128,), "float32"),
    "assist_info_for_combine": TensorSpec((8192,), "int32"),
    "expert_token_nums": TensorSpec((1,), "int64"),
    "ep_recv_counts": TensorSpec((16,), "int32"),
    "tp_recv_counts": TensorSpec((2,), "int32"),
    "expand_scales": TensorSpec((64,), "float32"),
    "hccl_buffer_bytes": 200 * 2**20,
}


def test_the_demo_of_the_first_page_is_accepted_and_allocated_alike():
    layout = check_dispatch(**DEMO)
    assert layout.capacity == 64
    inferred = infer_dispatch(layout, "bfloat16", 0)
    assert inferred == {name: DEMO[name] for name in inferred}
    assert len(inferred) == 7


@pytest.mark.parametrize(
    "violation",
    [
        ({"expand_x.0": 127}, 561002, "expand_x", "at least 128"),
        ({"ep_recv_counts.0": 15}, 561002, "ep_recv_counts", "at least 16"),
        ({"tp_recv_counts.0": 1}, 561002, "tp_recv_counts", r"\(2,\)"),
        ({"expert_token_nums.0": 2}, 561002, "expert_token_nums", r"\(1,\)"),
        ({"assist_info_for_combine.0": 191}, 561002, "assist_info_for_combine", "at least 192"),
        (
            {"quant_mode": 2, "expand_x.dtype": "int8", "dynamic_scales.0": 127},
            561002,
            "dynamic_scales",
            "at least 128",
        ),
        # td = al(14336 + 44, 512) = 14848, tc = 14336: EP 2·(8·14848·8 + 8·14336·3) = 2588672 < TP 2·64·(td + tc).
        (
            {"hccl_buffer_bytes": 3735551},
            561002,
            "hccl_buffer_bytes",
            "at least 3735552 for the TP group; use HCCL_BUFFSIZE 4 ",
        ),
        ({"hccl_buffer_bytes": 2588671}, 561002, "hccl_buffer_bytes", "at least 2588672 for the EP group"),
    ],
    ids=lambda v: v[2],
)
def test_two_tp_ranks_double_the_outputs(refuses, violation):
    refuses(check_dispatch, DEMO, violation)


# Ranks 0…3 host two shared experts, two ranks each; ranks 4…7 one MoE expert each. Bs 3, so a shared rank receives
# the 3 tokens of cdiv(8, 2) = 4 sources.
SHARED = {
    "x": TensorSpec((3, 1024), "bfloat16"),
    "expert_ids": TensorSpec((3, 2), "int32"),
    "scales": TensorSpec((2 + 8, 1024), "float32"),
    "group_ep": "ep",
    "ep_world_size": 8,
    "ep_rank_id": 3,
    "moe_expert_num": 8,
    "shared_expert_num": 2,
    "shared_expert_rank_num": 4,
    "quant_mode": 2,
    "expand_x": TensorSpec((12, 1024), "int8"),
    "dynamic_scales": TensorSpec((12,), "float32"),
    "assist_info_for_combine": TensorSpec((36,), "int32"),
    "expert_token_nums": TensorSpec((1,), "int64"),
    "ep_recv_counts": TensorSpec((8,), "int32"),
    "tp_recv_counts": TensorSpec((0,), "int32"),
}


def test_a_shared_rank_has_its_own_sizes(refuses):
    layout = check_dispatch(**SHARED)
    assert (layout.capacity, layout.local_experts, layout.is_shared, layout.experts_per_rank) == (12, 1, True, 2)
    for violation in (
        ({"expand_x.0": 11}, 561002, "expand_x", "at least 12"),
        ({"ep_recv_counts.0": 7}, 561002, "ep_recv_counts", "at least 8"),
        ({"expert_token_nums.0": 2}, 561002, "expert_token_nums", r"\(1,\)"),
        ({"scales.0": 8}, 561002, "scales", r"\(10, 1024\)"),
        # td = 2560, tc = 2048 as above: 2·(3·2560·8·2 + 3·2048·(2 + 2)); rows return to K + Sn places.
        ({"hccl_buffer_bytes": 294911}, 561002, "hccl_buffer_bytes", "at least 294912 "),
        # The same outputs on a MoE rank: A = 24·min(2, 2) = 48.
        ({"ep_rank_id": 4}, 561002, "expand_x", "at least 48"),
        # elastic_info: the larger of both kinds, on every rank (§2.4).
        ({"elastic_info": ELASTIC}, 561002, "expand_x", "at least 48"),
        # A rank elsewhere has 5 tokens: 5·4 rows.
        ({"global_bs": 40}, 561002, "expand_x", "at least 20"),
    ):
        refuses(check_dispatch, SHARED, violation)


TINY = {
    "x": TensorSpec((0, 1), "float32"),
    "expert_ids": TensorSpec((0, 1), "int32"),
    "group_ep": "ep",
    "ep_world_size": 1,
    "ep_rank_id": 0,
    "moe_expert_num": 1,
}


@pytest.mark.parametrize("limits", [RELAXED, UNLIMITED], ids=lambda limits: limits.name)
def test_relaxed_limits_take_a_world_of_one_rank_without_tokens(limits):
    layout = check_dispatch(**TINY, limits=limits)
    assert layout.capacity == 0
    with pytest.raises(ConstraintError, match="limits"):
        check_dispatch(**TINY, limits=ATLAS_A3)


@pytest.mark.parametrize("limits", [ATLAS_A3, RELAXED], ids=lambda limits: limits.name)
@pytest.mark.parametrize(
    "large",
    [
        {"x": TensorSpec((513, 1024), "float16"), "expert_ids": TensorSpec((513, 1), "int32")},
        {"x": TensorSpec((2, 8193), "float16")},
        {"expert_ids": TensorSpec((2, 17), "int32")},
        {"moe_expert_num": 1026},
        {"ep_world_size": 770, "moe_expert_num": 770},
        {"shared_expert_num": 5, "shared_expert_rank_num": 5, "ep_world_size": 6, "moe_expert_num": 30},
        {"comm_alg": "fullmesh_v2", "expert_ids": TensorSpec((2, 13), "int32")},
    ],
    ids=",".join,
)
def test_only_unlimited_takes_more_than_the_chip(limits, large):
    call = {
        "x": TensorSpec((2, 1024), "float16"),
        "expert_ids": TensorSpec((2, 1), "int32"),
        "group_ep": "ep",
        "ep_world_size": 2,
        "ep_rank_id": 0,
        "moe_expert_num": 20,
    } | large
    check_dispatch(**call, limits=UNLIMITED)
    with pytest.raises(ConstraintError, match='limits="unlimited"'):
        check_dispatch(**call, limits=limits)


def test_float32_comes_back_as_float32():
    call = TINY | {"limits": RELAXED, "expand_x": TensorSpec((0, 1), "float32")}
    check_dispatch(**call)
    with pytest.raises(ConstraintError, match="must be float32, what quant_mode 0 makes of x"):
        check_dispatch(**call | {"expand_x": TensorSpec((0, 1), "float16")})
    with pytest.raises(UnsupportedTypeError, match="must be bfloat16, float16 or float32; use"):
        check_dispatch(**call | {"x": TensorSpec((0, 1), "float64")})
