"""What "fullmesh_v2" and "hierarchy" take, of the release that has them (§2.2, §2.14, §2.16)."""

from __future__ import annotations

import pytest

from evenmoe.contract.comm_alg import more_counts
from evenmoe.contract.dispatch import infer_dispatch
from evenmoe.contract.limits import ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026, RELAXED
from evenmoe.contract.tensor_spec import TensorSpec
from tests.contract.checks import check_combine, check_combine_add_rms_norm, check_dispatch

MASK = TensorSpec((8, 2), "bool")
ELASTIC = TensorSpec((36,), "int32")
# Sixteen ranks of two experts, 8 tokens each to 2 experts: G = 128, A = 256 rows.
DISPATCH = {
    "x": TensorSpec((8, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 2), "int32"),
    "expert_scales": TensorSpec((8, 2), "float32"),
    "group_ep": "ep",
    "ep_world_size": 16,
    "ep_rank_id": 1,
    "moe_expert_num": 32,
    "comm_alg": "hierarchy",
    # ep·L = 32 counts, and 2·G·K·ep / 8 = 2·128·2·2 = 1024 behind them.
    "ep_recv_counts": TensorSpec((1056,), "int32"),
    "limits": ATLAS_A3_2026,
}
COMBINE = {
    "expand_x": TensorSpec((256, 1024), "bfloat16"),
    "expert_ids": TensorSpec((8, 2), "int32"),
    "assist_info_for_combine": TensorSpec((256 * 128,), "int32"),
    # Behind the counts it asks for one k alone: 2·128·1·2 = 512.
    "ep_send_counts": TensorSpec((544,), "int32"),
    "expert_scales": TensorSpec((8, 2), "float32"),
    "expand_scales": TensorSpec((256,), "float32"),
    **{name: DISPATCH[name] for name in ("group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num")},
    "comm_alg": "hierarchy",
    "limits": ATLAS_A3_2026,
}
EITHER = [
    (
        {"elastic_info": ELASTIC},
        561002,
        "comm_alg",
        '"hierarchy" with elastic_info: it must not come with elastic_info',
    ),
    ({"zero_expert_num": 1}, 561002, "comm_alg", "must not come with zero, copy or const experts"),
    ({"x_active_mask": MASK}, 561002, "comm_alg", "must not come with a two-dimensional x_active_mask"),
    ({"shared_expert_rank_num": 8, "moe_expert_num": 16}, 561002, "comm_alg", "not come with ranks of shared experts"),
    ({"global_bs": 144}, 561002, "comm_alg", "with global_bs 144, so unequal Bs"),
    ({"ep_world_size": 24, "moe_expert_num": 48}, 561002, "comm_alg", "with 24 ranks: it takes 16 to 256 in steps"),
    ({"ep_world_size": 272, "moe_expert_num": 272}, 561002, "comm_alg", "with 272 ranks"),
    ({"moe_expert_num": 528}, 561002, "comm_alg", "with 528 physical experts: it takes 1 to 512 physical experts"),
]


@pytest.mark.parametrize("limits", [ATLAS_A3, ATLAS_A3_2026], ids=lambda limits: limits.name)
@pytest.mark.parametrize(("check", "valid"), [(check_dispatch, DISPATCH), (check_combine, COMBINE)])
def test_hierarchy_alone_is_taken(accepts, refuses, check, valid, limits):
    valid = valid | {"limits": limits}
    accepts(check, valid, {})
    accepts(check, valid, {"x_active_mask": TensorSpec((8,), "bool")})
    for violation in EITHER:
        refuses(check, valid, violation)


def test_what_dispatch_asks_for_with_hierarchy(accepts, refuses):
    accepts(check_dispatch, DISPATCH, {"x.1": 32})  # the tiling has no lower bound of its own
    for violation in [
        ({"expert_scales": None}, 161001, "expert_scales", "must be given; pass the gate weights, which"),
        ({"expert_scales": TensorSpec((16,), "float32")}, 561002, "expert_scales", "must be 2-D"),
        ({"expert_scales.1": 3}, 561002, "expert_scales", r"must have the shape \(8, 2\)"),
        ({"scales": TensorSpec((32, 1024), "float32"), "quant_mode": 2}, 561002, "comm_alg", "not come with scales"),
        ({"x.1": 1040}, 561002, "comm_alg", "with 1040 columns: it takes 32 to 7168 in steps of 32 columns"),
        ({"x.1": 7200}, 561002, "comm_alg", "with 7200 columns"),
        ({"x.0": 257}, 561002, "comm_alg", "with 257 tokens: it takes 1 to 256 tokens"),
        ({"ep_recv_counts.0": 1055}, 561002, "ep_recv_counts", "at least 1056 entries"),
    ]:
        refuses(check_dispatch, DISPATCH, violation)


def test_what_combine_asks_for_with_hierarchy(refuses):
    for violation in [
        ({"expand_scales": None}, 161001, "expand_scales", "must be given; pass dispatch's expand_scales"),
        ({"expand_scales": TensorSpec((256, 1), "float32")}, 561002, "expand_scales", "must be 1-D"),
        ({"expand_scales.0": 255}, 561002, "expand_scales", "at least 256 entries, one weight per row"),
        ({"shared_expert_x": TensorSpec((8, 1024), "bfloat16")}, 561002, "comm_alg", "not come with shared_expert_x"),
        ({"ep_send_counts.0": 543}, 561002, "ep_send_counts", "at least 544 entries"),
    ]:
        refuses(check_combine, COMBINE, violation)


def test_the_release_before_has_no_hierarchy(accepts, refuses):
    text = 'is \'hierarchy\': it must be "", "fullmesh_v1" or "fullmesh_v2"; use "" for the default'
    refuses(check_dispatch, DISPATCH | {"limits": ATLAS_A3_2025}, ({}, 561002, "comm_alg", text))
    # combine looks at no name that it does not know
    before = {"limits": ATLAS_A3_2025, "expand_scales": None, "tp_send_counts": TensorSpec((0,), "int32")}
    accepts(check_combine, COMBINE, before | {"shared_expert_x": TensorSpec((8, 1024), "bfloat16")})


def test_the_norm_has_no_algorithm(accepts):
    norm = {"residual_x": TensorSpec((8, 1, 1024), "bfloat16"), "gamma": TensorSpec((1024,), "bfloat16")}
    accepts(check_combine_add_rms_norm, COMBINE | norm, {"expand_scales": None, "ep_send_counts.0": 32})


def test_hierarchy_in_small():
    call = DISPATCH | {"x": TensorSpec((8, 1), "bfloat16"), "ep_world_size": 2, "moe_expert_num": 2, "limits": RELAXED}
    layout = check_dispatch(**call)
    assert more_counts(layout, 2) == 2 * 16 * 2 * 2 // 8
    assert infer_dispatch(layout, "bfloat16", 0, hierarchy=True)["ep_recv_counts"].shape == (2 + 16,)


def test_the_buffer_of_hierarchy(accepts, refuses):
    """M·maxBs·(2 H + 4·(3·(K + 7) // 8·8) + 64) bytes and 404 MiB: here 4·(27 // 8·8) = 96."""
    need = 32 * 8 * (2048 + 96 + 64) + 404 * 2**20
    for check, valid in ((check_dispatch, DISPATCH), (check_combine, COMBINE)):
        accepts(check, valid, {"hccl_buffer_bytes": need})
        refuses(check, valid, ({"hccl_buffer_bytes": need - 1}, 561002, "hccl_buffer_bytes", f"at least {need}"))


def test_full_mesh_v2_excludes_less_since_2026(accepts, refuses):
    call = DISPATCH | {"comm_alg": "fullmesh_v2"}
    excluded = [{"elastic_info": ELASTIC}, {"zero_expert_num": 1}, {"x_active_mask": MASK}, {"global_bs": 144}]
    before = {"limits": ATLAS_A3_2025, "tp_recv_counts": TensorSpec((0,), "int32")}
    accepts(check_dispatch, call | before, {})
    for changes in excluded:
        accepts(check_dispatch, call, changes)
        accepts(check_dispatch, call | {"limits": ATLAS_A3}, changes)
        refuses(check_dispatch, call | before, (changes, 561002, "comm_alg", "must not come with"))
    peers = {"tp_world_size": 2, "group_tp": "tp", "moe_expert_num": 16, "tp_recv_counts": TensorSpec((2,), "int32")}
    refuses(check_dispatch, call | {"limits": ATLAS_A3}, (peers, 561002, "comm_alg", "not come with tp_world_size 2"))
