"""Every rule of specification §3.2 and §4, and the order of §3.6, for combine and combine_add_rms_norm, 2025."""

from __future__ import annotations

import inspect

import pytest

from evenmoe.contract.limits import ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import ALLOCATED, TensorSpec
from tests.contract.checks import check_combine, check_combine_add_rms_norm

LONG_NAME = "g" * 128
INT32_MAX = 2**31 - 1

# Eight ranks of two experts, 8 tokens each to 4 experts: 64 tokens in the world, so A = 64·min(2, 4) = 128 rows.
# tp_world_size 1 is no TP, and the bounds A·tp and ep·L·tp bite all the same.
VALID = {
    "expand_x": TensorSpec((128, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), "int32"),
    "assist_info_for_combine": TensorSpec((128 * 128,), "int32"),
    "ep_send_counts": TensorSpec((16,), "int32"),
    "expert_scales": TensorSpec((8, 4), "float32"),
    "tp_send_counts": TensorSpec((1,), "int32"),
    "x_active_mask": TensorSpec((8, 4), "bool"),
    "activation_scale": None,
    "weight_scale": None,
    "group_list": None,
    "expand_scales": TensorSpec((128,), "float32"),
    "shared_expert_x": TensorSpec((2, 4, 1024), "bfloat16"),
    "elastic_info": None,
    "ori_x": TensorSpec((8, 1024), "bfloat16"),
    "const_expert_alpha_1": TensorSpec((3, 1024), "bfloat16"),
    "const_expert_alpha_2": TensorSpec((3, 1024), "bfloat16"),
    "const_expert_v": TensorSpec((3, 1024), "bfloat16"),
    "performance_info": None,
    "group_ep": "ep",
    "group_tp": "",
    "ep_world_size": 8,
    "ep_rank_id": 1,
    "moe_expert_num": 16,
    "tp_world_size": 1,
    "const_expert_num": 3,
    "x_out": TensorSpec((8, 1024), "bfloat16"),
    # As in dispatch: td = al(2048 + 44, 512) = 2560, tc = 2048, 2·(8·2560·8·2 + 8·2048·4).
    "hccl_buffer_bytes": 786432,
    "limits": ATLAS_A3_2025,
}
ELASTIC = TensorSpec((20,), "int32")
TP = {"tp_world_size": 2, "tp_rank_id": 1, "group_tp": "tp"}
FLAT = TensorSpec((1024,), "bfloat16")

# §3.6 up to the tensor ranks: the same for both operators, apart from the negative virtual experts.
WRAPPER = [
    ({"expand_x": None}, 161001, "expand_x", "must be given"),
    ({"expert_ids": None}, 161001, "expert_ids", "must be given"),
    ({"assist_info_for_combine": None}, 161001, "assist_info_for_combine", "must be given"),
    ({"ep_send_counts": None}, 161001, "ep_send_counts", "pass dispatch's ep_recv_counts"),
    ({"expert_scales": None}, 161001, "expert_scales", "must be given"),
    ({"x_out": None}, 161001, "x_out", "must be given"),
    ({"group_ep": None}, 161001, "group_ep", "must be a name"),
    ({"group_ep": ""}, 161001, "group_ep", "must be a name"),
    ({"group_tp": None}, 161001, "group_tp", "must be a name"),
    ({"group_ep": LONG_NAME}, 161002, "group_ep", "is 128 characters long: it must have at most 127"),
    ({"group_tp": LONG_NAME}, 161002, "group_tp", "is 128 characters long: it must have at most 127"),
]
PRESENCE = [
    ({"moe_expert_num": None}, 561002, "moe_expert_num", "is None: it must be an integer"),
    ({"comm_quant_mode": "int8"}, 561002, "comm_quant_mode", "is 'int8': it must be an integer"),
]
NEGATIVE = [
    ({"zero_expert_num": -1}, 561002, "zero_expert_num", "must be at least 0"),
    ({"copy_expert_num": -7}, 561002, "copy_expert_num", "must be at least 0"),
    ({"const_expert_num": -1}, 561002, "const_expert_num", "must be at least 0"),
]
MINUS_ONE = [
    ({"zero_expert_num": -1}, 561002, "zero_expert_num", "is -1: it must not be -1"),
    ({"copy_expert_num": -1}, 561002, "copy_expert_num", "is -1: it must not be -1"),
    ({"const_expert_num": -1}, 561002, "const_expert_num", "is -1: it must not be -1"),
]
ATTRIBUTES = [
    ({"zero_expert_num": INT32_MAX, "moe_expert_num": 16}, 561002, "moe_expert_num", f"at most {INT32_MAX}"),
    ({"ep_world_size": 1}, 561002, "ep_world_size", 'must be 2 to 768; .*limits="relaxed"'),
    ({"ep_world_size": 769}, 561002, "ep_world_size", 'must be 2 to 768; .*limits="unlimited"'),
    ({"tp_world_size": 3}, 561002, "tp_world_size", "must be 0 to 2"),
    ({"ep_rank_id": 8}, 561002, "ep_rank_id", "must be 0 to 7"),
    ({"ep_rank_id": -1}, 561002, "ep_rank_id", "must be 0 to 7"),
    ({"tp_world_size": 0, "tp_rank_id": 1}, 561002, "tp_rank_id", "must be 0 without TP"),
    ({**TP, "tp_rank_id": -1}, 561002, "tp_rank_id", "must be 0 or 1"),
    ({**TP, "group_tp": ""}, 561002, "group_tp", "must be a name when tp_world_size is 2"),
    ({**TP, "group_tp": "ep"}, 561002, "group_tp", "must not be the EP group's name"),
    ({**TP, "comm_quant_mode": 2}, 561002, "comm_quant_mode", "must be 0 when tp_world_size is 2"),
    ({"expert_shard_type": 1}, 561002, "expert_shard_type", "must be 0"),
    ({"shared_expert_num": 5}, 561002, "shared_expert_num", "must be 0 to 4"),
    ({"shared_expert_num": -1}, 561002, "shared_expert_num", "must be 0 to 4"),
    ({"shared_expert_rank_num": 8}, 561002, "shared_expert_rank_num", "must be 0 to 7"),
    ({"shared_expert_rank_num": -1}, 561002, "shared_expert_rank_num", "must be 0 to 7"),
    ({"moe_expert_num": 0}, 561002, "moe_expert_num", "must be 1 to 1024"),
    ({"moe_expert_num": 1025}, 561002, "moe_expert_num", 'must be 1 to 1024; .*limits="unlimited"'),
    ({"comm_quant_mode": 1, "tp_world_size": 1, "tp_rank_id": 0}, 561002, "comm_quant_mode", "must be 0 or 2"),
    ({"comm_quant_mode": 3, "tp_world_size": 1, "tp_rank_id": 0}, 561002, "comm_quant_mode", "must be 0 or 2"),
]
REQUIRED_DIMS = [
    ({"expand_x": FLAT}, 561002, "expand_x", "must be 2-D"),
    ({"expert_ids": TensorSpec((8, 2, 2), "int32")}, 561002, "expert_ids", "must be 2-D"),
    ({"assist_info_for_combine": TensorSpec((128, 128), "int32")}, 561002, "assist_info_for_combine", "must be 1-D"),
    ({"ep_send_counts": TensorSpec((2, 8), "int32")}, 561002, "ep_send_counts", "must be 1-D"),
    ({"expert_scales": TensorSpec((32,), "float32")}, 561002, "expert_scales", "must be 2-D"),
]
OTHER_DIMS = [
    ({"ori_x": FLAT}, 561002, "ori_x", "must be 2-D"),
    ({"const_expert_alpha_1": FLAT}, 561002, "const_expert_alpha_1", "must be 2-D"),
    ({"const_expert_alpha_2": FLAT}, 561002, "const_expert_alpha_2", "must be 2-D"),
    ({"const_expert_v": FLAT}, 561002, "const_expert_v", "must be 2-D"),
    ({"tp_send_counts": None}, 561002, "tp_send_counts", "must be given, although it is declared optional"),
    ({"tp_send_counts": TensorSpec((1, 1), "int32")}, 561002, "tp_send_counts", "must be 1-D"),
    ({"x_active_mask": TensorSpec((), "bool")}, 561002, "x_active_mask", "must be 1 or 2-D"),
    ({"elastic_info": TensorSpec((1, 20), "int32")}, 561002, "elastic_info", "must be 1-D"),
    ({"activation_scale": TensorSpec((1,), "float32")}, 561002, "activation_scale", "must be None; .*reserved"),
    ({"weight_scale": TensorSpec((1,), "float32")}, 561002, "weight_scale", "must be None"),
    ({"group_list": TensorSpec((1,), "int64")}, 561002, "group_list", "must be None"),
    ({"shared_expert_x": FLAT}, 561002, "shared_expert_x", "must be 2 or 3-D"),
]
# Of the token dtypes: outside the list 161002, another one of the list 561002.
DTYPES = [
    ({"expert_ids.dtype": "int64"}, 161002, "expert_ids", "must be int32"),
    ({"assist_info_for_combine.dtype": "int64"}, 161002, "assist_info_for_combine", "must be int32"),
    ({"ep_send_counts.dtype": "int64"}, 161002, "ep_send_counts", "must be int32"),
    ({"expert_scales.dtype": "bfloat16"}, 161002, "expert_scales", "must be float32"),
    ({"tp_send_counts": TensorSpec((1,), "int64")}, 161002, "tp_send_counts", "must be int32"),
    ({"x_active_mask": TensorSpec((8,), "uint8")}, 161002, "x_active_mask", "must be bool"),
    ({"expand_scales.dtype": "float16"}, 161002, "expand_scales", "must be float32"),
    ({"elastic_info": TensorSpec((20,), "int64")}, 161002, "elastic_info", "must be int32"),
]
TOKEN_DTYPES = [
    ({f"{name}.dtype": dtype}, status, name, text)
    for name in (
        "shared_expert_x",
        "ori_x",
        "const_expert_alpha_1",
        "const_expert_alpha_2",
        "const_expert_v",
        "x_out",
    )
    for dtype, status, text in (
        ("float32", 161002, "must be bfloat16 or float16"),
        ("float16", 561002, "must be bfloat16, expand_x's"),
    )
]
CONSISTENCY = [
    ({"shared_expert_num": 2, "shared_expert_rank_num": 3}, 561002, "shared_expert_rank_num", "positive multiple"),
    ({"shared_expert_num": 4, "shared_expert_rank_num": 0}, 561002, "shared_expert_rank_num", "positive multiple"),
    ({"shared_expert_num": 0, "shared_expert_rank_num": 2}, 561002, "shared_expert_rank_num", "positive multiple"),
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
        "times 8 ranks = 4096: it must keep .* at 1 to 2048",
    ),
    ({**TP, "moe_expert_num": 16, "comm_quant_mode": 0}, 561002, "tp_world_size", "is 2 with 2 experts per rank"),
    (
        {**TP, "moe_expert_num": 8, "elastic_info": ELASTIC, "comm_quant_mode": 0},
        561002,
        "elastic_info",
        "must be None",
    ),
    ({"expert_ids.0": 0}, 561002, "expert_ids", 'of 0 tokens: it must have 1 to 512 tokens; .*limits="relaxed"'),
    ({"expert_ids.0": 513}, 561002, "expert_ids", 'must have 1 to 512 tokens; .*limits="unlimited"'),
    ({"global_bs": 56}, 561002, "global_bs", "at least Bs·ep = 64"),
    ({"global_bs": 65}, 561002, "global_bs", "multiple of ep_world_size 8"),
    ({"global_bs": 72, "x_active_mask": VALID["x_active_mask"]}, 561002, "x_active_mask", "with global_bs 72"),
    ({"ori_x": None, "copy_expert_num": 1}, 561002, "ori_x", "must be given for copy and const experts"),
    ({"ori_x": None, "copy_expert_num": 1, "const_expert_num": 0}, 561002, "ori_x", "given for copy and const experts"),
    ({"ori_x": None, "copy_expert_num": 0, "const_expert_num": 1}, 561002, "ori_x", "given for copy and const experts"),
    ({"const_expert_alpha_1": None, "const_expert_num": 1}, 561002, "const_expert_alpha_1", "given for const experts"),
    ({"const_expert_alpha_1": None, "const_expert_num": 3}, 561002, "const_expert_alpha_1", "given for const experts"),
    ({"const_expert_alpha_2": None, "const_expert_num": 3}, 561002, "const_expert_alpha_2", "given for const experts"),
    ({"const_expert_v": None, "const_expert_num": 3}, 561002, "const_expert_v", "given for const experts"),
    ({"expert_ids.1": 0}, 561002, "expert_ids", "of 0 columns: it must have 1 to 16 columns"),
    ({"expert_ids.1": 17}, 561002, "expert_ids", 'of 17 columns: .*limits="unlimited"'),
    ({"expert_ids.1": 12, "moe_expert_num": 8, "const_expert_num": 3}, 561002, "expert_ids", "at most 11 columns"),
    ({"elastic_info": TensorSpec((21,), "int32")}, 561002, "elastic_info", r"must have the shape \(20,\)"),
    ({"expand_x.0": 127}, 561002, "expand_x", "must have at least 128 entries, the rows that dispatch makes room for"),
    ({"expand_x.1": 1023}, 561002, "expand_x", 'of width 1023: it must have 1024 to 8192 columns; .*limits="relaxed"'),
    ({"expand_x.1": 8193}, 561002, "expand_x", 'must have 1024 to 8192 columns; .*limits="unlimited"'),
    ({"assist_info_for_combine.0": 16383}, 561002, "assist_info_for_combine", "at least 16384 entries, 128 per row"),
    ({"ep_send_counts.0": 15}, 561002, "ep_send_counts", "at least 16 entries"),
    ({"tp_send_counts": TensorSpec((2,), "int32")}, 561002, "tp_send_counts", r"must have the shape \(1,\)"),
    ({"tp_send_counts": TensorSpec((0,), "int32")}, 561002, "tp_send_counts", r"must have the shape \(1,\)"),
    ({"expert_scales.0": 9}, 561002, "expert_scales", r"must have the shape \(8, 4\)"),
    ({"expert_scales.1": 5}, 561002, "expert_scales", r"must have the shape \(8, 4\)"),
    ({"x_active_mask": TensorSpec((9,), "bool")}, 561002, "x_active_mask", r"must have the shape \(8,\)"),
    ({"x_active_mask": TensorSpec((8, 3), "bool")}, 561002, "x_active_mask", r"must have the shape \(8, 4\)"),
]
SHARED_X = [
    (
        {"shared_expert_x": TensorSpec((7, 1024), "bfloat16")},
        561002,
        "shared_expert_x",
        r"must be \(8, 1024\), or \(a, b",
    ),
    ({"shared_expert_x": TensorSpec((2, 3, 1024), "bfloat16")}, 561002, "shared_expert_x", r"a·b = 8"),
    ({"shared_expert_x": TensorSpec((-2, -4, 1024), "bfloat16")}, 561002, "shared_expert_x", r"a·b = 8"),
    ({"shared_expert_x": TensorSpec((8, 1025), "bfloat16")}, 561002, "shared_expert_x", r"must be \(8, 1024\)"),
]
OUT = [
    ({"x_out": TensorSpec(shape, "bfloat16")}, 561002, "x_out", r"shape \(8, 1024\)")
    for shape in ((7, 1024), (8, 1, 1024))
]
VIRTUAL_SHAPES = [
    ({"ori_x.0": 9}, 561002, "ori_x", r"must have the shape \(8, 1024\)"),
    ({"ori_x.1": 1025}, 561002, "ori_x", r"must have the shape \(8, 1024\)"),
    ({"const_expert_alpha_1.0": 2}, 561002, "const_expert_alpha_1", r"must have the shape \(3, 1024\)"),
    ({"const_expert_alpha_2.1": 2}, 561002, "const_expert_alpha_2", r"must have the shape \(3, 1024\)"),
    ({"const_expert_v.0": 4}, 561002, "const_expert_v", r"must have the shape \(3, 1024\)"),
    ({"performance_info": TensorSpec((8,), "int64")}, 561002, "performance_info", "must be None"),
    ({"hccl_buffer_bytes": 786431}, 561002, "hccl_buffer_bytes", "at least 786432 for the EP group"),
]
VIOLATIONS = [
    *WRAPPER,
    *PRESENCE,
    *NEGATIVE,
    *ATTRIBUTES,
    *REQUIRED_DIMS,
    *OTHER_DIMS,
    ({"expand_x.dtype": "int32"}, 561002, "expand_x", "must not be int32, although it is declared"),
    ({"expand_x.dtype": "float32"}, 161002, "expand_x", 'must be bfloat16 or float16; .*limits="relaxed"'),
    ({"expand_x.dtype": "int8"}, 161002, "expand_x", "use bfloat16 or float16.$"),
    *DTYPES,
    *TOKEN_DTYPES,
    *CONSISTENCY,
    *SHARED_X,
    *OUT,
    *VIRTUAL_SHAPES,
]

VALID_NORM = VALID | {
    "residual_x": TensorSpec((8, 1, 1024), "bfloat16"),
    "gamma": TensorSpec((1024,), "bfloat16"),
    "norm_eps": -1.0,  # not examined
    "y_out": TensorSpec((8, 1, 1024), "bfloat16"),
    "rstd_out": TensorSpec((8, 1, 1), "float32"),
    "x_out": TensorSpec((8, 1, 1024), "bfloat16"),
}
NORM_VIOLATIONS = [
    *WRAPPER,
    ({"residual_x": None}, 161001, "residual_x", "pass what is added before the norm"),
    ({"gamma": None}, 161001, "gamma", "pass the norm's weight"),
    ({"y_out": None}, 161001, "y_out", "must be given"),
    ({"rstd_out": None}, 161001, "rstd_out", "must be given"),
    *PRESENCE,
    *MINUS_ONE,
    *ATTRIBUTES,
    *REQUIRED_DIMS,
    ({"residual_x": TensorSpec((8, 1024), "bfloat16")}, 561002, "residual_x", "must be 3-D"),
    ({"gamma": TensorSpec((1, 1024), "bfloat16")}, 561002, "gamma", "must be 1 or 3-D"),
    *OTHER_DIMS,
    ({"expand_x.dtype": "float16"}, 161002, "expand_x", 'must be bfloat16; use bfloat16, or lift .*limits="relaxed"'),
    ({"expand_x.dtype": "int32"}, 161002, "expand_x", "must be bfloat16; use bfloat16.$"),
    *DTYPES,
    ({"rstd_out.dtype": "bfloat16"}, 161002, "rstd_out", "must be float32"),
    *(
        ({f"{name}.dtype": "float16"}, 161002, name, "must be bfloat16; convert it")
        for name in ("residual_x", "gamma", "shared_expert_x", "ori_x", "const_expert_v", "x_out", "y_out")
    ),
    *CONSISTENCY,
    *SHARED_X,
    ({"residual_x": TensorSpec((9, 1, 1024), "bfloat16")}, 561002, "residual_x", r"shape \(8, 1, 1024\)"),
    ({"residual_x": TensorSpec((8, 2, 512), "bfloat16")}, 561002, "residual_x", r"shape \(8, 1, 1024\)"),
    ({"gamma": TensorSpec((1023,), "bfloat16")}, 561002, "gamma", r"must be \(1024,\), or \(8, 1, 1024\)"),
    ({"gamma": TensorSpec((1, 1, 1024), "bfloat16")}, 561002, "gamma", r"must be \(1024,\), or \(8, 1, 1024\)"),
    ({"y_out.1": 2}, 561002, "y_out", r"shape \(8, 1, 1024\)"),
    ({"rstd_out": TensorSpec((8, 1), "float32")}, 561002, "rstd_out", r"shape \(8, 1, 1\)"),
    ({"x_out": TensorSpec((8, 1024), "bfloat16")}, 561002, "x_out", r"shape \(8, 1, 1024\)"),
    *VIRTUAL_SHAPES,
]


def name_of(violation):
    return ",".join(f"{key}={value}" for key, value in violation[0].items())[:60]


@pytest.mark.parametrize("violation", VIOLATIONS, ids=name_of)
def test_every_rule_refuses(refuses, violation):
    refuses(check_combine, VALID, violation)


@pytest.mark.parametrize("violation", NORM_VIOLATIONS, ids=name_of)
def test_every_rule_with_the_norm_refuses(refuses, violation):
    refuses(check_combine_add_rms_norm, VALID_NORM, violation)


def test_the_documented_order(earlier_wins):
    earlier_wins(check_combine, VALID, VIOLATIONS)


def test_the_documented_order_with_the_norm(earlier_wins):
    earlier_wins(check_combine_add_rms_norm, VALID_NORM, NORM_VIOLATIONS)


NO_CONST = {f"const_expert_{name}": None for name in ("alpha_1", "alpha_2", "v")}
ACCEPTED = [
    {},
    {"x_active_mask": None},
    {"x_active_mask": TensorSpec((8,), "bool")},
    {"shared_expert_x": None},
    {"shared_expert_x": TensorSpec((8, 1024), "bfloat16")},
    {"shared_expert_x": TensorSpec((8, 1, 1024), "bfloat16")},
    {"expand_scales": None},
    {"expand_scales": TensorSpec((5, 5), "float32")},
    {"elastic_info": ELASTIC},
    {"comm_quant_mode": 2},
    {"comm_alg": "whatever"},  # not examined in combine on Atlas A3
    {"out_dtype": 7, "group_list_type": None},  # nor these
    {"const_expert_num": 0, **NO_CONST, "ori_x": None},
    {"const_expert_num": 0, **NO_CONST, "ori_x": None, "zero_expert_num": 5},
    {"const_expert_num": 0, **NO_CONST, "copy_expert_num": 5},
    {"expand_x.0": 129, "ep_send_counts.0": 17, "assist_info_for_combine.0": 20000},
    {"global_bs": 64},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda c: ",".join(map(str, c))[:60])
def test_what_is_legal_is_accepted(accepts, changes):
    accepts(check_combine, VALID, changes)
    accepts(check_combine_add_rms_norm, VALID_NORM, changes)


def test_gamma_may_come_as_the_first_page_shows_it(accepts):
    accepts(check_combine_add_rms_norm, VALID_NORM, {"gamma": TensorSpec((8, 1, 1024), "bfloat16")})


def test_the_norm_refuses_only_minus_one(accepts):
    accepts(check_combine_add_rms_norm, VALID_NORM, {"zero_expert_num": -2})


def test_without_tp_the_chip_multiplies_by_zero(accepts, refuses):
    """tp_world_size 0: in 2025 A·0 rows and ep·L·0 counts are asked for (§3.2), elsewhere those of one TP rank."""
    short = {"tp_world_size": 0, "tp_send_counts": TensorSpec((0,), "int32")}
    rows, counts = short | {"expand_x.0": 1}, short | {"ep_send_counts.0": 0}
    for changes in (rows, counts):
        accepts(check_combine, VALID, changes)
        accepts(check_combine, VALID | {"limits": ATLAS_A3}, changes)
    for limits in (ATLAS_A3_2026, RELAXED, UNLIMITED):
        refuses(check_combine, VALID | {"limits": limits}, (rows, 561002, "expand_x", "at least 128 entries"))
        refuses(check_combine, VALID | {"limits": limits}, (counts, 561002, "ep_send_counts", "at least 16 entries"))


def test_tp_send_counts_are_looked_at_with_peers_and_in_2025(accepts, refuses):
    changes = {"tp_send_counts": None, "tp_world_size": 0}
    any_shape = {"tp_send_counts": TensorSpec((5, 7), "int32")}
    refuses(check_combine, VALID, (changes, 561002, "tp_send_counts", "must be given"))
    accepts(check_combine, VALID | {"limits": ATLAS_A3_2026}, changes)
    for limits in (ATLAS_A3, RELAXED, UNLIMITED):
        accepts(check_combine, VALID | {"limits": limits}, changes)
        accepts(check_combine, VALID | {"limits": limits}, any_shape)
        tp = TP | {"moe_expert_num": 8, "tp_send_counts": None}
        refuses(check_combine, VALID | {"limits": limits}, (tp, 561002, "tp_send_counts", "must be given"))


def test_shared_expert_x_and_shared_ranks_exclude_each_other(accepts, refuses):
    """Rank 1 of two shared ranks, R = 2: cdiv(8, 2)·8 = 32 rows, and L = 18 / 6."""
    ranks = {"shared_expert_num": 1, "shared_expert_rank_num": 2, "moe_expert_num": 18, "hccl_buffer_bytes": None}
    text = "must be None when shared_expert_rank_num is 2"
    refuses(check_combine, VALID, (ranks, 561002, "shared_expert_x", text))
    fitting = {"shared_expert_x": None, "expand_x.0": 32, "ep_send_counts.0": 8, "assist_info_for_combine.0": 32 * 128}
    accepts(check_combine, VALID, ranks | fitting)
    refuses(check_combine, VALID, (ranks | fitting | {"expand_x.0": 31}, 561002, "expand_x", "at least 32"))
    refuses(check_combine, VALID, (ranks | fitting | {"ep_send_counts.0": 7}, 561002, "ep_send_counts", "at least 8"))


def test_the_signature_shows_the_documented_arguments_and_defaults():
    combine = inspect.signature(check_combine).parameters
    norm = inspect.signature(check_combine_add_rms_norm).parameters
    assert set(norm) - set(combine) == {"residual_x", "gamma", "norm_eps", "y_out", "rstd_out"}
    assert norm["norm_eps"].default == 1e-6
    assert combine["shared_expert_num"].default == 1
    assert combine["x_out"].default is ALLOCATED
    assert combine["tp_send_counts"].default is None
    assert [combine[name].default for name in ("out_dtype", "comm_quant_mode", "group_list_type")] == [0, 0, 0]
