"""Every rule of specification §2.2 to §2.4 and §2.9 to §2.13 as of December 2025, and the order of the checks."""

from __future__ import annotations

import inspect

import pytest

from evenmoe.contract.limits import ATLAS_A3, ATLAS_A3_2025
from evenmoe.contract.tensor_spec import ALLOCATED, TensorSpec
from tests.contract.checks import check_dispatch

LONG_NAME = "g" * 128
INT32_MAX = 2**31 - 1

# Eight ranks of two experts, 8 tokens each to 4 experts: 64 tokens in the world, so A = 64·min(2, 4) = 128 rows.
# Every output is as small as §2.3 allows.
VALID = {
    "x": TensorSpec((8, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), "int32"),
    "scales": TensorSpec((16, 1024), "float32"),
    "x_active_mask": TensorSpec((8, 4), "bool"),
    "expert_scales": TensorSpec((8, 4), "float32"),
    "elastic_info": None,
    "performance_info": None,
    "group_ep": "ep",
    "group_tp": "",
    "ep_world_size": 8,
    "ep_rank_id": 1,
    "moe_expert_num": 16,
    "quant_mode": 2,
    "expand_x": TensorSpec((128, 1024), "int8"),
    "dynamic_scales": TensorSpec((128,), "float32"),
    "assist_info_for_combine": TensorSpec((384,), "int32"),
    "expert_token_nums": TensorSpec((2,), "int64"),
    "ep_recv_counts": TensorSpec((16,), "int32"),
    "tp_recv_counts": TensorSpec((0,), "int32"),
    "expand_scales": TensorSpec((128,), "float32"),
    # §2.2 by hand: td = al(2048 + 44, 512) = 2560, tc = 2048, 2·(8·2560·8·2 + 8·2048·4) = 786432.
    "hccl_buffer_bytes": 786432,
    "limits": ATLAS_A3_2025,
}
ELASTIC = TensorSpec((20,), "int32")
TP = {"tp_world_size": 2, "tp_rank_id": 1, "group_tp": "tp"}
NO_TP = {"tp_world_size": 0, "tp_rank_id": 0}
PLAIN = {"elastic_info": None, "x_active_mask": None, "global_bs": 0, "zero_expert_num": 0, "copy_expert_num": 0}
FULL_MESH_V2 = {"comm_alg": "fullmesh_v2", **PLAIN, "const_expert_num": 0, **NO_TP}

# In the order of §2.13.
VIOLATIONS = [
    ({"x": None}, 161001, "x", "`x` is None: it must be given"),
    ({"expert_ids": None}, 161001, "expert_ids", "must be given"),
    ({"expand_x": None}, 161001, "expand_x", "must be given"),
    ({"assist_info_for_combine": None}, 161001, "assist_info_for_combine", "must be given"),
    ({"expert_token_nums": None}, 161001, "expert_token_nums", "must be given"),
    ({"ep_recv_counts": None}, 161001, "ep_recv_counts", "must be given"),
    ({"tp_recv_counts": None}, 161001, "tp_recv_counts", "must be given"),
    ({"group_ep": None}, 161001, "group_ep", "must be a name; pass the name of the EP group"),
    ({"group_ep": ""}, 161001, "group_ep", "`group_ep` is ''"),
    ({"group_tp": None}, 161001, "group_tp", 'pass "" where there is no TP'),
    ({"dynamic_scales": None, "quant_mode": 2}, 161001, "dynamic_scales", "output of quant_mode 2"),
    ({"group_ep": LONG_NAME}, 161001, "group_ep", "is 128 characters long: it must have at most 127"),
    ({"group_tp": LONG_NAME}, 161001, "group_tp", "is 128 characters long: it must have at most 127"),
    # attribute presence
    ({"ep_world_size": None}, 561002, "ep_world_size", "is None: it must be an integer"),
    ({"quant_mode": 0.5}, 561002, "quant_mode", "is 0.5: it must be an integer"),
    # virtual experts
    ({"zero_expert_num": -1}, 561002, "zero_expert_num", "must be at least 0"),
    ({"copy_expert_num": -2}, 561002, "copy_expert_num", "must be at least 0"),
    ({"const_expert_num": -3}, 561002, "const_expert_num", "must be at least 0"),
    ({"zero_expert_num": INT32_MAX, "moe_expert_num": 16}, 561002, "moe_expert_num", f"at most {INT32_MAX}"),
    # ep, tp, ep rank, tp rank and group
    ({"ep_world_size": 1}, 561002, "ep_world_size", r'2 to 768; use 2 to 768 ranks, or lift .* limits="relaxed"'),
    ({"ep_world_size": 769}, 561002, "ep_world_size", r'2 to 768; use 2 to 768 ranks, or lift .* limits="unlimited"'),
    ({"tp_world_size": 3}, 561002, "tp_world_size", "is 3: it must be 0 to 2; use 0 for no TP.$"),
    ({"tp_world_size": -1}, 561002, "tp_world_size", "is -1: it must be 0 to 2"),
    ({"ep_rank_id": 8}, 561002, "ep_rank_id", "is 8: it must be 0 to 7"),
    ({"ep_rank_id": -1}, 561002, "ep_rank_id", "is -1: it must be 0 to 7"),
    ({"tp_world_size": 1, "tp_rank_id": 1}, 561002, "tp_rank_id", "must be 0 without TP"),
    ({**TP, "tp_rank_id": 2}, 561002, "tp_rank_id", "must be 0 or 1"),
    ({**TP, "group_tp": ""}, 561002, "group_tp", "must be a name when tp_world_size is 2"),
    ({**TP, "group_tp": "ep"}, 561002, "group_tp", "must not be the EP group's name"),
    # shard type, Sn, Sr, M, quantMode, token-nums type, commAlg
    ({"expert_shard_type": 1}, 561002, "expert_shard_type", "must be 0"),
    ({"shared_expert_num": -1}, 561002, "shared_expert_num", "must be 0 to 4"),
    ({"shared_expert_num": 5}, 561002, "shared_expert_num", 'limits="unlimited"'),
    ({"shared_expert_rank_num": -1}, 561002, "shared_expert_rank_num", "must be 0 to 7"),
    ({"shared_expert_rank_num": 8}, 561002, "shared_expert_rank_num", "must be 0 to 7"),
    ({"moe_expert_num": 0}, 561002, "moe_expert_num", "is 0: it must be 1 to 1024; use 1 to 1024 physical experts"),
    ({"moe_expert_num": 1025}, 561002, "moe_expert_num", 'limits="unlimited"'),
    ({"quant_mode": 3}, 561002, "quant_mode", "is 3: it must be 0 or 2"),
    ({"quant_mode": -1}, 561002, "quant_mode", "is -1: it must be 0 or 2"),
    ({"expert_token_nums_type": 2}, 561002, "expert_token_nums_type", "must be 0 or 1"),
    ({"comm_alg": "hierarchy"}, 561002, "comm_alg", 'is \'hierarchy\': it must be "", "fullmesh_v1"'),
    # static quant, scales
    ({"quant_mode": 1}, 561002, "quant_mode", "is 1: it must be 0 or 2, static quantisation is not supported"),
    ({"quant_mode": 0, "scales": VALID["scales"]}, 561002, "scales", "must be None under quant_mode 0"),
    # tensor ranks
    ({"x": TensorSpec((8, 1, 1024), "bfloat16")}, 561002, "x", r"must be 2-D, \(tokens, hidden\)"),
    ({"expert_ids": TensorSpec((32,), "int32")}, 561002, "expert_ids", "must be 2-D"),
    ({"scales": TensorSpec((1024,), "float32"), "quant_mode": 2}, 561002, "scales", "must be 2-D"),
    ({"x_active_mask": TensorSpec((8, 4, 1), "bool")}, 561002, "x_active_mask", "must be 1 or 2-D"),
    ({"elastic_info": TensorSpec((1, 20), "int32")}, 561002, "elastic_info", "must be 1-D"),
    ({"expand_x": TensorSpec((128,), "int8")}, 561002, "expand_x", "must be 2-D"),
    ({"dynamic_scales": TensorSpec((128, 1), "float32"), "quant_mode": 2}, 561002, "dynamic_scales", "must be 1-D"),
    ({"assist_info_for_combine": TensorSpec((128, 3), "int32")}, 561002, "assist_info_for_combine", "must be 1-D"),
    ({"expert_token_nums": TensorSpec((), "int64")}, 561002, "expert_token_nums", "must be 1-D"),
    ({"ep_recv_counts": TensorSpec((2, 8), "int32")}, 561002, "ep_recv_counts", "must be 1-D"),
    ({"tp_recv_counts": TensorSpec((), "int32")}, 561002, "tp_recv_counts", "must be 1-D"),
    # dtypes
    ({"x.dtype": "float32"}, 161002, "x", 'must be bfloat16 or float16; .* limits="relaxed"'),
    ({"x.dtype": "int8"}, 161002, "x", "use bfloat16 or float16.$"),
    ({"expert_ids.dtype": "int64"}, 161002, "expert_ids", "must be int32; convert it to int32"),
    ({"scales.dtype": "bfloat16"}, 161002, "scales", "must be float32"),
    ({"x_active_mask": TensorSpec((8,), "int8")}, 161002, "x_active_mask", "must be bool"),
    ({"expert_scales.dtype": "float16"}, 161002, "expert_scales", "must be float32"),
    ({"elastic_info": TensorSpec((20,), "int64")}, 161002, "elastic_info", "must be int32"),
    ({"expand_x.dtype": "float32"}, 161002, "expand_x", "must be bfloat16, float16 or int8"),
    ({"expand_x.dtype": "bfloat16", "quant_mode": 2}, 561002, "expand_x", "must be int8, what quant_mode 2 makes of x"),
    ({"dynamic_scales.dtype": "float16"}, 161002, "dynamic_scales", "must be float32"),
    ({"assist_info_for_combine.dtype": "int64"}, 161002, "assist_info_for_combine", "must be int32"),
    ({"expert_token_nums.dtype": "int32"}, 161002, "expert_token_nums", "must be int64"),
    ({"ep_recv_counts.dtype": "int64"}, 161002, "ep_recv_counts", "must be int32"),
    ({"tp_recv_counts.dtype": "int64"}, 161002, "tp_recv_counts", "must be int32"),
    ({"expand_scales.dtype": "float16"}, 161002, "expand_scales", "must be float32"),
    # the shared pair
    ({"shared_expert_num": 2, "shared_expert_rank_num": 3}, 561002, "shared_expert_rank_num", "is 3 with .*num 2"),
    ({"shared_expert_num": 2, "shared_expert_rank_num": 0}, 561002, "shared_expert_rank_num", "positive multiple"),
    ({"shared_expert_num": 0, "shared_expert_rank_num": 2}, 561002, "shared_expert_rank_num", "positive multiple"),
    # commAlg restrictions
    ({**FULL_MESH_V2, "elastic_info": ELASTIC}, 561002, "comm_alg", "must not come with elastic_info"),
    ({**FULL_MESH_V2, "zero_expert_num": 1}, 561002, "comm_alg", "must not come with zero, copy or const"),
    ({**FULL_MESH_V2, "copy_expert_num": 1}, 561002, "comm_alg", "must not come with zero, copy or const"),
    ({**FULL_MESH_V2, "const_expert_num": 1}, 561002, "comm_alg", "must not come with zero, copy or const"),
    ({**FULL_MESH_V2, "x_active_mask": VALID["x_active_mask"]}, 561002, "comm_alg", "with a two-dimensional x_active"),
    ({**FULL_MESH_V2, **TP}, 561002, "comm_alg", "must not come with tp_world_size 2"),
    ({**FULL_MESH_V2, "global_bs": 72}, 561002, "comm_alg", "global_bs 72, so unequal Bs"),
    ({**FULL_MESH_V2, "x.0": 257}, 561002, "comm_alg", 'with 257 tokens: it takes 0 to 256 .*limits="unlimited"'),
    ({**FULL_MESH_V2, "expert_ids.1": 13, "x.0": 8}, 561002, "comm_alg", "with 13 experts per token: it takes 0 to 12"),
    # divisibility, L, TP
    ({"moe_expert_num": 17, "shared_expert_rank_num": 0}, 561002, "moe_expert_num", "divide evenly by the 8 ranks"),
    # 511 experts per rank times 8 would be too many as well.
    (
        {"moe_expert_num": 1023, "shared_expert_rank_num": 6, "shared_expert_num": 1},
        561002,
        "moe_expert_num",
        "divide evenly by the 2 ranks",
    ),
    (
        {"moe_expert_num": 1024, "shared_expert_rank_num": 6, "shared_expert_num": 1},
        561002,
        "moe_expert_num",
        "512 on each rank, times 8 ranks = 4096: it must keep .* at 1 to 2048",
    ),
    ({**TP, "moe_expert_num": 16}, 561002, "tp_world_size", "is 2 with 2 experts per rank"),
    ({**TP, "moe_expert_num": 8, "elastic_info": ELASTIC}, 561002, "elastic_info", "None when tp_world_size is 2"),
    # Bs, globalBs, H, Bs match, K, mask
    ({"x.0": 0}, 561002, "x", 'of 0 tokens: it must have 1 to 512 tokens; use 1 to 512 .*limits="relaxed"'),
    ({"x.0": 513}, 561002, "x", 'of 513 tokens: it must have 1 to 512 tokens; .*limits="unlimited"'),
    ({"global_bs": 56}, 561002, "global_bs", "multiple of ep_world_size 8 that is at least Bs·ep = 64"),
    ({"global_bs": 65}, 561002, "global_bs", "multiple of ep_world_size 8"),
    ({"global_bs": -64}, 561002, "global_bs", "multiple of ep_world_size 8"),
    ({"global_bs": 72, "x_active_mask": VALID["x_active_mask"]}, 561002, "x_active_mask", "with global_bs 72"),
    ({"x.1": 1023}, 561002, "x", 'of width 1023: it must have 1024 to 8192 columns; .*limits="relaxed"'),
    ({"x.1": 8193}, 561002, "x", 'of width 8193: it must have 1024 to 8192 columns; .*limits="unlimited"'),
    ({"expert_ids.0": 9}, 561002, "expert_ids", "one row for each of the 8 tokens of x"),
    (
        {"expert_ids.1": 0},
        561002,
        "expert_ids",
        "of 0 columns: it must have 1 to 16 columns; use 1 to 16 experts per token",
    ),
    ({"expert_ids.1": 17}, 561002, "expert_ids", 'of 17 columns: .*limits="unlimited"'),
    ({"expert_ids.1": 9, "moe_expert_num": 8}, 561002, "expert_ids", "at most 8 columns, one per expert"),
    ({"x_active_mask": TensorSpec((7,), "bool")}, 561002, "x_active_mask", r"must have the shape \(8,\)"),
    ({"x_active_mask": TensorSpec((8, 5), "bool")}, 561002, "x_active_mask", r"must have the shape \(8, 4\)"),
    # scales shape, elastic length
    (
        {"scales.0": 17},
        561002,
        "scales",
        r"must have the shape \(16, 1024\), one row for each shared and each physical",
    ),
    ({"scales.1": 1025}, 561002, "scales", r"must have the shape \(16, 1024\)"),
    ({"elastic_info": TensorSpec((19,), "int32")}, 561002, "elastic_info", r"must have the shape \(20,\)"),
    # outputs
    ({"expand_x.0": 127}, 561002, "expand_x", "must have at least 128 entries, the rows that may arrive"),
    ({"expand_x.1": 1025}, 561002, "expand_x", r"must have the shape \(128, 1024\)"),
    ({"dynamic_scales.0": 127}, 561002, "dynamic_scales", "at least 128 entries"),
    ({"assist_info_for_combine.0": 383}, 561002, "assist_info_for_combine", "at least 384 entries"),
    ({"expert_token_nums.0": 1}, 561002, "expert_token_nums", r"must have the shape \(2,\)"),
    ({"expert_token_nums.0": 3}, 561002, "expert_token_nums", r"must have the shape \(2,\)"),
    ({"ep_recv_counts.0": 15}, 561002, "ep_recv_counts", "at least 16 entries"),
    ({"tp_recv_counts.0": 1}, 561002, "tp_recv_counts", r"must have the shape \(0,\)"),
    # performance info, buffer
    ({"performance_info": TensorSpec((8,), "int64")}, 561002, "performance_info", "must be None; .* not measured"),
    ({"hccl_buffer_bytes": 786431}, 561002, "hccl_buffer_bytes", r"at least 786432 for the EP group; .* 1 \(MB\)"),
]


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: ",".join(f"{k}={x}"[:40] for k, x in v[0].items())[:60])
def test_every_rule_refuses(refuses, violation):
    refuses(check_dispatch, VALID, violation)


def test_the_documented_order(earlier_wins):
    earlier_wins(check_dispatch, VALID, VIOLATIONS)


OUTPUTS = (
    "expand_x",
    "dynamic_scales",
    "assist_info_for_combine",
    "expert_token_nums",
    "ep_recv_counts",
    "tp_recv_counts",
    "expand_scales",
)
ACCEPTED = [
    {},
    {"x.dtype": "float16"},
    {"group_ep": "g" * 127},
    {"group_tp": "g" * 127},
    {"x_active_mask": None},
    {"x_active_mask": TensorSpec((8,), "bool")},
    {"scales": None},
    {"expert_scales": TensorSpec((3,), "float32")},  # ignored in 2025
    {"elastic_info": ELASTIC},
    {"comm_alg": None},
    {"comm_alg": "fullmesh_v1"},
    {**FULL_MESH_V2, "x_active_mask": TensorSpec((8,), "bool")},
    {"expert_token_nums_type": 0},
    {"tp_world_size": 1, "tp_recv_counts": TensorSpec((1,), "int32")},
    {"tp_world_size": 1, "group_tp": "ep", "tp_recv_counts": TensorSpec((1,), "int32")},
    {"shared_expert_num": 0},
    {"quant_mode": 0, "scales": None, "expand_x.dtype": "bfloat16", "dynamic_scales": TensorSpec((1, 2, 3), "float32")},
    {"quant_mode": 0, "scales": None, "expand_x.dtype": "bfloat16", "dynamic_scales": None, "expand_scales": None},
    {"expand_scales": TensorSpec((0,), "float32")},
    {"expand_x.0": 129, "dynamic_scales.0": 1000, "assist_info_for_combine.0": 128 * 128, "ep_recv_counts.0": 17},
    {"global_bs": 64},
    {"zero_expert_num": 1, "copy_expert_num": 2, "const_expert_num": 3},
    {"zero_expert_num": INT32_MAX - 16},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda c: ",".join(map(str, c))[:60])
def test_what_is_legal_is_accepted(accepts, changes):
    accepts(check_dispatch, VALID, changes)


def test_the_signature_shows_the_documented_arguments_and_defaults():
    parameters = inspect.signature(check_dispatch).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    required = {"x", "expert_ids", "group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num"}
    assert {name for name, default in defaults.items() if default is inspect.Parameter.empty} == required
    tensors = ("scales", "x_active_mask", "expert_scales", "elastic_info", "performance_info", "hccl_buffer_bytes")
    attributes = {
        "shared_expert_num": 1,
        "expert_token_nums_type": 1,
        "comm_alg": "",
        "group_tp": "",
        "limits": ATLAS_A3,
    }
    zeros = (
        "tp_world_size",
        "tp_rank_id",
        "expert_shard_type",
        "shared_expert_rank_num",
        "quant_mode",
        "global_bs",
        "zero_expert_num",
        "copy_expert_num",
        "const_expert_num",
    )
    expected = dict.fromkeys(tensors) | dict.fromkeys(OUTPUTS, ALLOCATED) | dict.fromkeys(zeros, 0) | attributes
    assert {name: default for name, default in defaults.items() if name not in required} == expected
