"""Where the releases of 2025 and 2026 differ, each is as its own; what either takes, "atlas-a3" takes (§2.16)."""

from __future__ import annotations

import pytest

from evenmoe.contract.limits import ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import EvenmoeError
from tests.contract.checks import check_combine, check_combine_add_rms_norm, check_dispatch
from tests.contract.conftest import apply

INT32 = "int32"
# Eight ranks of two experts, 8 tokens each to 4 experts: A = 64·min(2, 4) = 128 rows.
WORLD = {"group_ep": "ep", "ep_world_size": 8, "ep_rank_id": 1, "moe_expert_num": 16}
DISPATCH = {
    "x": TensorSpec((8, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), INT32),
    "expand_x": TensorSpec((128, 1024), "bfloat16"),
    "assist_info_for_combine": TensorSpec((128 * 128,), INT32),
    "expert_token_nums": TensorSpec((2,), "int64"),
    "ep_recv_counts": TensorSpec((16,), INT32),
    "tp_recv_counts": TensorSpec((0,), INT32),
    "expand_scales": TensorSpec((128,), "float32"),
    **WORLD,
}
COMBINE = {
    "expand_x": TensorSpec((128, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 4), INT32),
    "assist_info_for_combine": TensorSpec((128 * 128,), INT32),
    "ep_send_counts": TensorSpec((16,), INT32),
    "expert_scales": TensorSpec((8, 4), "float32"),
    "tp_send_counts": TensorSpec((0,), INT32),
    **WORLD,
}
NORM = {"residual_x": TensorSpec((8, 1, 1024), "bfloat16"), "gamma": TensorSpec((1024,), "bfloat16")}
PEERS = {"tp_world_size": 2, "group_tp": "tp", "moe_expert_num": 8, "tp_rank_id": 1}
PEERS_OUT = {
    "expand_x.0": 128,
    "expert_token_nums.0": 1,
    "ep_recv_counts.0": 16,
    "tp_recv_counts": TensorSpec((2,), INT32),
}
PEERS_IN = {"tp_send_counts": TensorSpec((2,), INT32)}
WEIGHTS = TensorSpec((8, 4), "float32")
CONST = {
    "const_expert_num": 3,
    "ori_x": TensorSpec((8, 1024), "bfloat16"),
    "const_expert_v": TensorSpec((3, 1024), "bfloat16"),
    "const_expert_alpha_1": TensorSpec((3,), "bfloat16"),
    "const_expert_alpha_2": TensorSpec((3,), "bfloat16"),
}

# check, its valid call, changes, argument and text of the error of 2025, and of 2026; None where it is taken
DIFFERENCES = [
    (
        check_dispatch,
        DISPATCH,
        PEERS | PEERS_OUT,
        None,
        ("tp_world_size", "2: it must be 0 to 1; .*atlas-a3-2026 with l"),
    ),
    (check_combine, COMBINE, PEERS | PEERS_IN, None, ("tp_world_size", 'lift .* with limits="atlas-a3"')),
    (check_combine_add_rms_norm, COMBINE | NORM, PEERS | PEERS_IN, None, ("tp_world_size", "must be 0 to 1")),
    (check_dispatch, DISPATCH, {"tp_recv_counts": None}, ("tp_recv_counts", "must be given"), None),
    (check_dispatch, DISPATCH, {"tp_recv_counts.0": 1}, ("tp_recv_counts", r"must have the shape \(0,\)"), None),
    (check_dispatch, DISPATCH, {"group_tp": None}, ("group_tp", "must be a name"), None),
    (check_dispatch, DISPATCH, {"tp_rank_id": 1}, ("tp_rank_id", "must be 0 without TP"), None),
    (check_combine, COMBINE, {"tp_send_counts": None}, ("tp_send_counts", "must be given, although"), None),
    (check_combine, COMBINE, {"tp_send_counts.0": 1}, ("tp_send_counts", r"must have the shape \(0,\)"), None),
    (check_combine, COMBINE, {"tp_send_counts": TensorSpec((2, 3), INT32)}, ("tp_send_counts", "must be 1-D"), None),
    (check_combine, COMBINE, {"group_tp": None}, ("group_tp", "must be a name"), None),
    (check_combine_add_rms_norm, COMBINE | NORM, {"tp_send_counts": None}, ("tp_send_counts", "must be given"), None),
    (
        check_dispatch,
        DISPATCH,
        {"assist_info_for_combine.0": 384},
        None,
        ("assist_info_for_combine", "16384 entries, 128"),
    ),
    (check_combine, COMBINE, {"expand_x.0": 1}, None, ("expand_x", "at least 128 entries")),
    (
        check_dispatch,
        DISPATCH,
        {"expert_scales": WEIGHTS, "expand_scales": None},
        None,
        ("expand_scales", "must be given"),
    ),
    (
        check_dispatch,
        DISPATCH,
        {"expert_scales": WEIGHTS, "expand_scales.0": 127},
        None,
        ("expand_scales", "at least 128"),
    ),
    (
        check_dispatch,
        DISPATCH,
        {"expert_scales": WEIGHTS, "expand_scales": TensorSpec((128, 1), "float32")},
        None,
        ("expand_scales", "must be 1-D"),
    ),
]


@pytest.mark.parametrize(("check", "valid", "changes", "in_2025", "in_2026"), DIFFERENCES, ids=lambda v: str(v)[:40])
def test_what_one_release_refuses_the_other_takes(accepts, refuses, check, valid, changes, in_2025, in_2026):
    assert (in_2025 is None) != (in_2026 is None)
    for limits, error in ((ATLAS_A3_2025, in_2025), (ATLAS_A3_2026, in_2026)):
        if error is None:
            accepts(check, valid | {"limits": limits}, changes)
            continue
        with pytest.raises(EvenmoeError, match=error[1]) as caught:
            check(**apply(valid | {"limits": limits}, changes))
        assert caught.value.argument == error[0]
    accepts(check, valid | {"limits": ATLAS_A3}, changes)


@pytest.mark.parametrize("limits", [ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026], ids=lambda limits: limits.name)
def test_without_differences_the_releases_agree(accepts, limits):
    for check, valid in (
        (check_dispatch, DISPATCH),
        (check_combine, COMBINE),
        (check_combine_add_rms_norm, COMBINE | NORM),
    ):
        accepts(check, valid | {"limits": limits}, {})


def test_a_weight_for_every_token_and_k_where_weights_are_sent(accepts, refuses):
    wrong, none = {"expert_scales": TensorSpec((3,), "float32")}, {"expert_scales": TensorSpec((0, 4), "float32")}
    accepts(check_dispatch, DISPATCH | {"limits": ATLAS_A3_2025}, wrong)
    for limits in (ATLAS_A3, ATLAS_A3_2026, RELAXED, UNLIMITED):
        text = r"must have the shape \(8, 4\), one weight per token and k"
        refuses(check_dispatch, DISPATCH | {"limits": limits}, (wrong, 561002, "expert_scales", text))
        accepts(check_dispatch, DISPATCH | {"limits": limits}, none | {"expand_scales": TensorSpec((0,), "float32")})
    accepts(check_dispatch, DISPATCH | {"limits": ATLAS_A3}, PEERS | PEERS_OUT | wrong)  # peers are of 2025


def test_no_peers_are_a_negative_number(refuses):
    for limits in (ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026):
        refuses(
            check_dispatch, DISPATCH | {"limits": limits}, ({"tp_world_size": -1}, 561002, "tp_world_size", "be 0 to")
        )


def test_peers_are_as_strict_as_in_2025(refuses):
    for limits in (ATLAS_A3, RELAXED, UNLIMITED):
        valid = DISPATCH | PEERS | {"limits": limits}
        refuses(check_dispatch, valid, ({"group_tp": None}, 161001, "group_tp", "must be a name"))
        refuses(check_dispatch, valid, ({"tp_recv_counts": None}, 161001, "tp_recv_counts", "must be given"))
        refuses(
            check_combine,
            COMBINE | PEERS | {"limits": limits},
            ({"tp_send_counts": None}, 561002, "tp_send_counts", "g"),
        )


@pytest.mark.parametrize("check", [check_combine, check_combine_add_rms_norm])
def test_alphas_of_one_dimension_are_of_november_2025(accepts, refuses, check):
    valid = COMBINE | CONST | (NORM if check is check_combine_add_rms_norm else {})
    for limits in (ATLAS_A3_2025, ATLAS_A3_2026):
        refuses(check, valid | {"limits": limits}, ({}, 561002, "const_expert_alpha_1", "must be 2-D"))
    for limits in (ATLAS_A3, RELAXED, UNLIMITED):
        call = valid | {"limits": limits}
        accepts(check, call, {})
        short = {"const_expert_alpha_2.0": 2}
        refuses(
            check, call, (short, 561002, "const_expert_alpha_2", r"must have the shape \(3,\), one factor per const")
        )
        mixed = {"const_expert_alpha_2": TensorSpec((3, 1024), "bfloat16")}
        text = r"must have as many dimensions as const_expert_alpha_1, which is bfloat16 \(3,\); pass both as rows"
        refuses(check, call, (mixed, 561002, "const_expert_alpha_2", text))
        refuses(
            check, call, ({"const_expert_v": TensorSpec((3,), "bfloat16")}, 561002, "const_expert_v", "must be 2-D")
        )
