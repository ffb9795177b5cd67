"""Combine in whole worlds: the demo of the first page, other dtypes and other limits."""

from __future__ import annotations

import pytest

from evenmoe.contract.limits import ATLAS_A3, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from tests.contract.checks import check_combine, check_combine_add_rms_norm

# The world of the operator's first page (§7), TP of two: A = 64 rows, twice; without the norm's tensors.
DEMO = {
    "expand_x": TensorSpec((128, 7168), "bfloat16"),
    "expert_ids": TensorSpec((8, 3), "int32"),
    "assist_info_for_combine": TensorSpec((8192,), "int32"),
    "ep_send_counts": TensorSpec((16,), "int32"),
    "expert_scales": TensorSpec((8, 3), "float32"),
    "tp_send_counts": TensorSpec((2,), "int32"),
    "shared_expert_x": TensorSpec((8, 1, 7168), "bfloat16"),
    "group_ep": "ep",
    "group_tp": "tp",
    "ep_world_size": 8,
    "ep_rank_id": 5,
    "tp_world_size": 2,
    "tp_rank_id": 0,
    "moe_expert_num": 8,
    "shared_expert_num": 0,
    "global_bs": 64,
    "group_list_type": 1,
    "comm_alg": None,
}
DEMO_NORM = DEMO | {
    "residual_x": TensorSpec((8, 1, 7168), "bfloat16"),
    "gamma": TensorSpec((8, 1, 7168), "bfloat16"),
    "norm_eps": 1e-6,
    "y_out": TensorSpec((8, 1, 7168), "bfloat16"),
    "rstd_out": TensorSpec((8, 1, 1), "float32"),
    "x_out": TensorSpec((8, 1, 7168), "bfloat16"),
}


def test_the_demo_of_the_first_page_is_accepted(refuses):
    assert check_combine(**DEMO).capacity == 64
    assert check_combine_add_rms_norm(**DEMO_NORM).capacity == 64
    for violation in (
        ({"expand_x.0": 127}, 561002, "expand_x", "at least 128"),
        ({"ep_send_counts.0": 15}, 561002, "ep_send_counts", "at least 16"),
        ({"assist_info_for_combine.0": 8191}, 561002, "assist_info_for_combine", "at least 8192"),
        # The TP group needs 2·64·(td + tc) with td = 14848, tc = 14336: see the same case of dispatch.
        ({"hccl_buffer_bytes": 3735551}, 561002, "hccl_buffer_bytes", "at least 3735552 for the TP group"),
    ):
        refuses(check_combine_add_rms_norm, DEMO_NORM, violation)


def test_dtypes_beside_the_chip():
    tokens = {name: TensorSpec(spec.shape, "float32") for name, spec in DEMO_NORM.items() if is_bfloat16(spec)}
    check_combine_add_rms_norm(**DEMO_NORM | tokens, limits=RELAXED)
    with pytest.raises(UnsupportedTypeError, match=r'must be bfloat16; .*limits="relaxed"'):
        check_combine_add_rms_norm(**DEMO_NORM | tokens, limits=ATLAS_A3)
    with pytest.raises(ConstraintError, match="must be float32, expand_x's"):
        check_combine_add_rms_norm(**DEMO_NORM | tokens | {"gamma": DEMO_NORM["gamma"]}, limits=RELAXED)


def is_bfloat16(value):
    return isinstance(value, TensorSpec) and value.dtype == "bfloat16"


@pytest.mark.parametrize("limits", [RELAXED, UNLIMITED], ids=lambda limits: limits.name)
def test_relaxed_limits_take_a_world_of_one_rank_without_tokens(limits):
    call = {
        "expand_x": TensorSpec((0, 1), "float32"),
        "expert_ids": TensorSpec((0, 1), "int32"),
        "assist_info_for_combine": TensorSpec((0,), "int32"),
        "ep_send_counts": TensorSpec((1,), "int32"),
        "expert_scales": TensorSpec((0, 1), "float32"),
        "shared_expert_x": TensorSpec((0, 5, 1), "float32"),
        "group_ep": "ep",
        "ep_world_size": 1,
        "ep_rank_id": 0,
        "moe_expert_num": 1,
    }
    assert check_combine(**call, limits=limits).capacity == 0
    with pytest.raises(ConstraintError, match='limits="relaxed"'):
        check_combine(**call)
