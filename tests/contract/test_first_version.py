"""Every rule of §2.17 and §3.8 for the first versions of dispatch and combine."""

from __future__ import annotations

import pytest

from evenmoe.contract.calls import CombineV1Call, DispatchV1Call
from evenmoe.contract.first_version import check_combine_v1_call, check_dispatch_v1_call
from evenmoe.contract.limits import ATLAS_A3_2025, ATLAS_A3_2026, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import TensorSpec
from tests.contract.checks import takes

check_dispatch = takes(DispatchV1Call, check_dispatch_v1_call)
check_combine = takes(CombineV1Call, check_combine_v1_call)

LONG_NAME = "g" * 128
INT32 = "int32"
# Eight ranks of two experts, 8 tokens each to 4 experts: 64 tokens in the world, so A = 64·min(2, 4) = 128 rows.
WORLD = {"group_ep": "ep", "ep_world_size": 8, "ep_rank_id": 1, "moe_expert_num": 16}
DISPATCH = {
    "x": TensorSpec((8, 7168), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), INT32),
    "scales": TensorSpec((16, 7168), "float32"),
    "quant_mode": 2,
    "expand_x": TensorSpec((128, 7168), "int8"),
    "dynamic_scales": TensorSpec((128,), "float32"),
    "expand_idx": TensorSpec((32,), INT32),
    "expert_token_nums": TensorSpec((2,), "int64"),
    "ep_recv_counts": TensorSpec((16,), INT32),
    "tp_recv_counts": TensorSpec((0,), INT32),
    "expand_scales": TensorSpec((128,), "float32"),
    **WORLD,
    "limits": ATLAS_A3_2025,
}
COMBINE = {
    "expand_x": TensorSpec((128, 7168), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), INT32),
    "expand_idx": TensorSpec((32,), INT32),
    "ep_send_counts": TensorSpec((16,), INT32),
    "expert_scales": TensorSpec((8, 4), "float32"),
    "tp_send_counts": TensorSpec((1,), INT32),
    "tp_world_size": 1,
    "x_out": TensorSpec((8, 7168), "bfloat16"),
    **WORLD,
    "limits": ATLAS_A3_2025,
}
TP = {"tp_world_size": 2, "tp_rank_id": 1, "group_tp": "tp"}
BOTH_NAMES = [
    ({"group_ep": None}, 161001, "group_ep", "must be a name"),
    ({"group_tp": None}, 161001, "group_tp", "must be a name"),
]
BOTH = [
    ({"ep_world_size": 4}, 561002, "ep_world_size", 'must be 8 to 288 in steps of 8; .* limits="relaxed"'),
    ({"ep_world_size": 24}, 561002, "ep_world_size", "must divide 256 or be a multiple of 144"),
    ({"ep_world_size": 432}, 561002, "ep_world_size", "must be 8 to 288"),
    ({"tp_world_size": 3}, 561002, "tp_world_size", "must be 0 to 2"),
    ({"ep_rank_id": 8}, 561002, "ep_rank_id", "must be 0 to 7"),
    ({"tp_world_size": 1, "tp_rank_id": 1}, 561002, "tp_rank_id", "must be 0 without TP"),
    ({"expert_shard_type": 1}, 561002, "expert_shard_type", "must be 0"),
    ({"shared_expert_rank_num": 8}, 561002, "shared_expert_rank_num", "must be 0 to 7"),
    ({"moe_expert_num": 520}, 561002, "moe_expert_num", "must be 1 to 512"),
    ({"shared_expert_num": 0}, 561002, "shared_expert_num", "must be 1 in the first version"),
    (
        {"shared_expert_rank_num": 3, "moe_expert_num": 15},
        561002,
        "shared_expert_rank_num",
        "must divide ep_world_size 8",
    ),
    ({"moe_expert_num": 17}, 561002, "moe_expert_num", "divide evenly by the 8 ranks"),
    ({"global_bs": 65}, 561002, "global_bs", "multiple of ep_world_size 8"),
    ({"expert_ids": TensorSpec((8, 9), INT32)}, 561002, "expert_ids", "of 9 columns: it must have 1 to 8 columns"),
]
DISPATCH_ALONE = [
    *[({name: None}, 161001, name, "must be given") for name in ("x", "expert_ids", "expand_x", "expand_idx")],
    *[
        ({name: None}, 161001, name, "must be given")
        for name in ("expert_token_nums", "ep_recv_counts", "tp_recv_counts")
    ],
    ({"dynamic_scales": None}, 161001, "dynamic_scales", "output of quant_mode 2"),
    ({"group_ep": LONG_NAME}, 161001, "group_ep", "must have at most 127"),
    ({"quant_mode": 1}, 561002, "quant_mode", "must be 0 or 2"),
    ({"expert_token_nums_type": 2}, 561002, "expert_token_nums_type", "must be 0 or 1"),
    ({"quant_mode": 0}, 561002, "scales", "must be None under quant_mode 0"),
    ({"x": TensorSpec((7168,), "bfloat16")}, 561002, "x", "must be 2-D"),
    ({"expand_idx": TensorSpec((8, 4), INT32)}, 561002, "expand_idx", "must be 1-D"),
    ({"x.dtype": "float32"}, 161002, "x", "must be bfloat16 or float16"),
    ({"expand_idx.dtype": "int64"}, 161002, "expand_idx", "must be int32"),
    ({"x_active_mask": TensorSpec((8,), INT32)}, 161002, "x_active_mask", "must be bool"),
    ({"x.0": 513}, 561002, "x", "must have 1 to 512 tokens"),
    ({"x.1": 7136}, 561002, "x", "of width 7136: it must have 7168 to 7168 columns"),
    ({"expert_ids.0": 9}, 561002, "expert_ids", "one row for each of the 8 tokens"),
    ({"scales.0": 17}, 561002, "scales", r"must have the shape \(16, 7168\)"),
    ({"expand_x.0": 127}, 561002, "expand_x", "at least 128 entries"),
    ({"expand_x.1": 1024}, 561002, "expand_x", r"must have the shape \(128, 7168\)"),
    ({"dynamic_scales.0": 127}, 561002, "dynamic_scales", "at least 128 entries"),
    ({"expand_idx.0": 33}, 561002, "expand_idx", r"must have the shape \(32,\), one per token and k"),
    ({"expert_token_nums.0": 1}, 561002, "expert_token_nums", r"must have the shape \(2,\)"),
    ({"ep_recv_counts.0": 15}, 561002, "ep_recv_counts", "at least 16 entries"),
    ({"tp_recv_counts.0": 1}, 561002, "tp_recv_counts", r"must have the shape \(0,\)"),
]
COMBINE_ALONE = [
    *[({name: None}, 161001, name, "must be given") for name in ("expand_x", "expert_ids", "expand_idx", "x_out")],
    *[({name: None}, 161001, name, "must be given") for name in ("ep_send_counts", "expert_scales", "tp_send_counts")],
    ({"group_ep": LONG_NAME}, 161002, "group_ep", "must have at most 127"),
    ({"comm_quant_mode": 1}, 561002, "comm_quant_mode", "must be 0 or 2"),
    ({**TP, "comm_quant_mode": 2}, 561002, "comm_quant_mode", "must be 0 when tp_world_size is 2"),
    ({"weight_scale": TensorSpec((1,), "float32")}, 561002, "weight_scale", "must be None; pass None, it is reserved"),
    ({"shared_expert_x": TensorSpec((8, 7168), "bfloat16")}, 561002, "shared_expert_x", "must be None; add it"),
    ({"expand_x.dtype": "float32"}, 161002, "expand_x", "must be bfloat16 or float16"),
    ({"expand_idx.dtype": "int64"}, 161002, "expand_idx", "must be int32"),
    ({"expert_ids.0": 513}, 561002, "expert_ids", "must have 1 to 512 tokens"),
    ({"expand_x.1": 1024}, 561002, "expand_x", "of width 1024: it must have 7168"),
    ({"expand_x.0": 127}, 561002, "expand_x", "at least 128 entries"),
    ({"expand_idx.0": 31}, 561002, "expand_idx", r"must have the shape \(32,\), one per token and k"),
    ({"ep_send_counts.0": 15}, 561002, "ep_send_counts", "at least 16 entries"),
    ({"tp_send_counts.0": 2}, 561002, "tp_send_counts", r"must have the shape \(1,\)"),
    ({"expert_scales.1": 5}, 561002, "expert_scales", r"must have the shape \(8, 4\)"),
    ({"x_out.0": 9}, 561002, "x_out", r"must have the shape \(8, 7168\)"),
]


def shown(violation):
    return ",".join(f"{k}={x}"[:40] for k, x in violation[0].items())[:60]


@pytest.mark.parametrize("violation", [*BOTH_NAMES, *BOTH, *DISPATCH_ALONE], ids=shown)
def test_every_rule_of_dispatch_refuses(refuses, violation):
    refuses(check_dispatch, DISPATCH, violation)


@pytest.mark.parametrize("violation", [*BOTH_NAMES, *BOTH, *COMBINE_ALONE], ids=shown)
def test_every_rule_of_combine_refuses(refuses, violation):
    refuses(check_combine, COMBINE, violation)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x.dtype": "float16"},
        {"x_active_mask": TensorSpec((3, 4, 5), "bool")},
        {"expert_scales": TensorSpec((1,), "float32"), "expand_scales": None},
        {"quant_mode": 0, "scales": None, "expand_x.dtype": "bfloat16", "dynamic_scales": None},
        {"shared_expert_rank_num": 4, "moe_expert_num": 16, "scales.0": 17, "expert_token_nums.0": 1},
        {"ep_world_size": 144, "moe_expert_num": 288, "scales.0": 288, "ep_recv_counts.0": 288, "expand_x.0": 2304}
        | {"dynamic_scales.0": 2304},
    ],
    ids=lambda changes: ",".join(changes)[:60],
)
def test_what_is_legal_is_accepted(accepts, changes):
    accepts(check_dispatch, DISPATCH, changes)


def test_the_rows_of_a_rank_with_the_shared_expert():
    """Rank 1 of two: 64 tokens of the world, half of which come here."""
    changes = {
        "shared_expert_rank_num": 2,
        "moe_expert_num": 12,
        "scales": None,
        "expand_x": TensorSpec((32, 7168), "int8"),
    }
    layout = check_dispatch(**DISPATCH | changes | {"expert_token_nums": TensorSpec((1,), "int64")})
    assert (layout.capacity, layout.is_shared, layout.shared_experts) == (32, True, 1)


def test_the_release_of_2026_has_no_peers_and_looks_at_the_weights(accepts, refuses):
    call = DISPATCH | {"limits": ATLAS_A3_2026}
    accepts(check_dispatch, call, {"tp_recv_counts": None, "group_tp": None, "tp_rank_id": 1})
    refuses(check_dispatch, call, ({**TP, "moe_expert_num": 8}, 561002, "tp_world_size", "must be 0 to 1"))
    wrong = {"expert_scales": TensorSpec((1,), "float32")}
    refuses(check_dispatch, call, (wrong, 561002, "expert_scales", r"must have the shape \(8, 4\), .* none is sent"))
    accepts(check_combine, COMBINE | {"limits": ATLAS_A3_2026}, {"tp_send_counts": None, "tp_world_size": 0})


def test_relaxed_limits_take_small_worlds(accepts):
    small = {"x": TensorSpec((0, 1), "float32"), "expert_ids": TensorSpec((0, 1), INT32)}
    for limits in (RELAXED, UNLIMITED):
        accepts(check_dispatch, small | WORLD | {"ep_world_size": 3, "moe_expert_num": 3, "limits": limits}, {})
