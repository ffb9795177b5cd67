"""Every rule of specification §1.6 and §1.7, the order in which they are checked, and the cases of §8.1 restated."""

from __future__ import annotations

import inspect

import pytest

from evenmoe.contract.limits import ATLAS_A3, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.contract.update_expert import infer_update_expert
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from tests.contract.checks import check_update_expert

VALID = {
    "expert_ids": TensorSpec((128, 8), "int32"),
    "eplb_table": TensorSpec((256, 5), "int32"),
    "local_rank_id": 0,
    "world_size": 8,
    "balance_mode": 0,
    "expert_scales": TensorSpec((128, 8), "float16"),
    "pruning_threshold": TensorSpec((8,), "float32"),
    "active_mask": TensorSpec((128,), "bool"),
    "balanced_expert_ids": TensorSpec((128, 8), "int32"),
    "balanced_active_mask": TensorSpec((128, 8), "bool"),
}
OLD = {
    "expert_ids": TensorSpec((128, 8), "int32"),
    "eplb_table": TensorSpec((256, 5), "int32"),
    "local_rank_id": 0,
    "world_size": 8,
    "balanced_expert_ids": TensorSpec((128, 8), "int32"),
    "generation": "eplb_update_expert",
}

# In the order of §1.7: null pointers, attributes, dtypes, shapes.
ATTRIBUTES = [
    ({"world_size": None}, 561002, "world_size", "is None: it must be an integer"),
    ({"balance_mode": 2}, 561002, "balance_mode", "is 2: it must be 0"),
    ({"balance_mode": -1}, 561002, "balance_mode", "is -1: it must be 0"),
    ({"balance_mode": 0, "world_size": 1}, 561002, "world_size", 'use 2 to .* ranks, or lift .*limits="relaxed"'),
    ({"balance_mode": 0, "world_size": -1}, 561002, "world_size", "under balance_mode 0; use 2 to [0-9]* ranks.$"),
    ({"balance_mode": 0, "world_size": 769}, 561002, "world_size", 'limits="unlimited"'),
    ({"balance_mode": 0, "world_size": 8, "local_rank_id": 8}, 561002, "local_rank_id", "must be 0 to 7"),
    ({"balance_mode": 0, "world_size": 8, "local_rank_id": -1}, 561002, "local_rank_id", "must be 0 to 7"),
]
IDS_SHAPE = [
    ({"expert_ids": TensorSpec((128,), "int32")}, 561002, "expert_ids", r"must be 2-D, \(tokens, top_k\)"),
    ({"expert_ids.0": 0}, 561002, "expert_ids", 'must have 1 to 512 tokens; use 1 to 512 .*limits="relaxed"'),
    ({"expert_ids.0": 513}, 561002, "expert_ids", 'must have 1 to 512 tokens; .*limits="unlimited"'),
    ({"expert_ids.1": 0}, 561002, "expert_ids", "must have 1 to 16 columns; use 1 to 16 experts per token.$"),
    ({"expert_ids.1": 17}, 561002, "expert_ids", 'must have 1 to 16 columns; .*limits="unlimited"'),
    ({"eplb_table": TensorSpec((1280,), "int32")}, 561002, "eplb_table", "must be 2-D"),
    ({"eplb_table.0": 0, "expert_ids.1": 8}, 561002, "eplb_table", "rows; use 1 to [0-9]* logical experts.$"),
    ({"eplb_table.0": 1025}, 561002, "eplb_table", 'rows; .*limits="unlimited"'),
    ({"eplb_table.0": 7, "expert_ids.1": 8}, 561002, "expert_ids", "at most 7 columns, one per expert"),
    ({"eplb_table.1": 1}, 561002, "eplb_table", "at least 2 columns, a count and an id"),
    ({"eplb_table.1": 10}, 561002, "eplb_table", "2 to 9 columns, for no rank reaches more than world_size 8 replicas"),
]
VIOLATIONS = [
    ({"expert_ids": None}, 161001, "expert_ids", "must be given"),
    ({"eplb_table": None}, 161001, "eplb_table", "must be given"),
    ({"balanced_expert_ids": None}, 161001, "balanced_expert_ids", "must be given"),
    ({"balanced_active_mask": None}, 161001, "balanced_active_mask", "also without pruning"),
    *ATTRIBUTES,
    ({"expert_ids.dtype": "int16"}, 161002, "expert_ids", "must be int32 or int64; convert it to int32"),
    ({"eplb_table.dtype": "int64"}, 161002, "eplb_table", "must be int32"),
    ({"expert_scales.dtype": "float64"}, 161002, "expert_scales", "must be float32, float16 or bfloat16"),
    ({"pruning_threshold.dtype": "bfloat16"}, 161002, "pruning_threshold", "must be float32"),
    ({"active_mask.dtype": "int8"}, 161002, "active_mask", "must be bool"),
    ({"balanced_expert_ids.dtype": "int8"}, 161002, "balanced_expert_ids", "must be int32 or int64"),
    ({"balanced_expert_ids.dtype": "int64", "expert_ids.dtype": "int32"}, 561002, "balanced_expert_ids", "expert_ids'"),
    ({"balanced_active_mask.dtype": "int32"}, 161002, "balanced_active_mask", "must be bool"),
    *IDS_SHAPE,
    (
        {"pruning_threshold": None, "expert_scales": VALID["expert_scales"]},
        561002,
        "pruning_threshold",
        "given with expert_scales",
    ),
    (
        {"expert_scales": None, "pruning_threshold": VALID["pruning_threshold"]},
        561002,
        "expert_scales",
        "given with pruning_threshold",
    ),
    (
        {"expert_scales": None, "pruning_threshold": None},
        561002,
        "active_mask",
        "must come with expert_scales and pruning_threshold",
    ),
    ({"expert_scales": TensorSpec((128,), "float16")}, 561002, "expert_scales", r"must have the shape \(128, 8\)"),
    ({"expert_scales.1": 9}, 561002, "expert_scales", r"must have the shape \(128, 8\)"),
    ({"pruning_threshold": TensorSpec((8, 1), "float32")}, 561002, "pruning_threshold", r"must be \(8,\) or \(1, 8\)"),
    ({"pruning_threshold": TensorSpec((7,), "float32")}, 561002, "pruning_threshold", r"must be \(8,\) or \(1, 8\)"),
    ({"active_mask": TensorSpec((127,), "bool")}, 561002, "active_mask", r"must have the shape \(128,\)"),
    ({"active_mask": TensorSpec((128, 8), "bool")}, 561002, "active_mask", r"must have the shape \(128,\)"),
    ({"balanced_expert_ids": TensorSpec((128,), "int32")}, 561002, "balanced_expert_ids", r"shape \(128, 8\)"),
    ({"balanced_active_mask.1": 9}, 561002, "balanced_active_mask", r"must have the shape \(128, 8\)"),
]
OLD_VIOLATIONS = [
    (
        {"generation": "newest"},
        561002,
        "generation",
        'is \'newest\': it must be "update_expert" or "eplb_update_expert"',
    ),
    ({"expert_ids": None}, 161001, "expert_ids", "must be given"),
    ({"eplb_table": None}, 161001, "eplb_table", "must be given"),
    ({"balanced_expert_ids": None}, 161001, "balanced_expert_ids", "must be given"),
    ({"world_size": None}, 561002, "world_size", "is None: it must be an integer"),
    ({"balance_mode": 1}, 561002, "balance_mode", "must be 0 for eplb_update_expert; use update_expert for mode 1"),
    *ATTRIBUTES[3:],
    ({"balance_mode": 0, "world_size": 385, "local_rank_id": 0}, 561002, "world_size", "must be 2 to 384"),
    ({"expert_ids.dtype": "int64"}, 161002, "expert_ids", "must be int32; convert"),
    ({"eplb_table.dtype": "int64"}, 161002, "eplb_table", "must be int32"),
    ({"balanced_expert_ids.dtype": "int64"}, 161002, "balanced_expert_ids", "must be int32; convert"),
    *IDS_SHAPE[:8],
    ({"eplb_table.0": 513}, 561002, "eplb_table", "must have 1 to 512 rows"),
    *IDS_SHAPE[8:],
    ({"expert_scales": TensorSpec((128, 8), "float16")}, 561002, "expert_scales", "eplb_update_expert does not prune"),
    ({"pruning_threshold": TensorSpec((8,), "float32")}, 561002, "pruning_threshold", "does not prune"),
    ({"active_mask": TensorSpec((128,), "bool")}, 561002, "active_mask", "does not prune"),
    ({"balanced_expert_ids.0": 127}, 561002, "balanced_expert_ids", r"must have the shape \(128, 8\)"),
]


def name_of(violation):
    return ",".join(f"{key}={value}" for key, value in violation[0].items())[:60]


@pytest.mark.parametrize("violation", VIOLATIONS, ids=name_of)
def test_every_rule_refuses(refuses, violation):
    refuses(check_update_expert, VALID, violation)


@pytest.mark.parametrize("violation", OLD_VIOLATIONS, ids=name_of)
def test_every_rule_of_the_older_operator_refuses(refuses, violation):
    refuses(check_update_expert, OLD, violation)


def test_the_documented_order(earlier_wins):
    earlier_wins(check_update_expert, VALID, VIOLATIONS)


def test_the_documented_order_of_the_older_operator(earlier_wins):
    earlier_wins(check_update_expert, OLD, [v for v in OLD_VIOLATIONS if "balance_mode" not in v[0] or len(v[0]) > 1])


NO_PRUNING = {"expert_scales": None, "pruning_threshold": None, "active_mask": None}
ACCEPTED = [
    {},
    NO_PRUNING,
    {"active_mask": None},
    {"pruning_threshold": TensorSpec((1, 8), "float32")},
    {"expert_scales.dtype": "float32"},
    {"expert_scales.dtype": "bfloat16"},
    {"expert_ids.dtype": "int64", "balanced_expert_ids.dtype": "int64"},
    {"eplb_table": TensorSpec((8, 2), "int32")},
    {"eplb_table": TensorSpec((1024, 9), "int32")},
    {"world_size": 2, "local_rank_id": 1, "eplb_table": TensorSpec((8, 3), "int32")},
    {"world_size": 768, "local_rank_id": 767, "eplb_table": TensorSpec((8, 769), "int32")},
    {"balance_mode": 1, "world_size": -1, "local_rank_id": -1, "eplb_table": TensorSpec((8, 769), "int32")},
    {"balance_mode": 1, "world_size": 10**9, "local_rank_id": 10**10, "eplb_table": TensorSpec((8, 2), "int32")},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda c: ",".join(map(str, c))[:60])
def test_what_is_legal_is_accepted(accepts, changes):
    accepts(check_update_expert, VALID, changes)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (512, 16)])
def test_the_edges_of_both_generations_are_inside(tokens, top_k):
    ids = TensorSpec((tokens, top_k), "int32")
    check_update_expert(expert_ids=ids, eplb_table=TensorSpec((16, 2), "int32"), local_rank_id=0, world_size=2)
    old = {"generation": "eplb_update_expert", "local_rank_id": 383, "world_size": 384}
    check_update_expert(expert_ids=ids, eplb_table=TensorSpec((512, 385), "int32"), **old)


@pytest.mark.parametrize(
    "violation",
    [
        ({"eplb_table.1": 1}, 561002, "eplb_table", "must have 2 to 769 columns; use 2 to 769 columns.$"),
        ({"eplb_table.1": 770}, 561002, "eplb_table", 'must have 2 to 769 columns; .*limits="unlimited"'),
    ],
    ids=name_of,
)
def test_by_token_the_chip_alone_bounds_the_columns(refuses, violation):
    refuses(check_update_expert, VALID | {"balance_mode": 1}, violation)


def test_relaxed_limits_take_no_tokens_and_one_rank():
    ids, table = TensorSpec((0, 1), "int64"), TensorSpec((1, 2), "int32")
    for limits in (RELAXED, UNLIMITED):
        check_update_expert(expert_ids=ids, eplb_table=table, local_rank_id=0, world_size=1, limits=limits)
    with pytest.raises(ConstraintError, match='limits="relaxed"'):
        check_update_expert(expert_ids=ids, eplb_table=table, local_rank_id=0, world_size=1, limits=ATLAS_A3)


def test_only_unlimited_takes_more_than_the_chip():
    ids, table = TensorSpec((513, 17), "int64"), TensorSpec((1025, 1000), "int32")
    for world, mode in ((769, 0), (0, 1)):
        call = {"expert_ids": ids, "eplb_table": table, "local_rank_id": 0, "world_size": world, "balance_mode": mode}
        check_update_expert(**call, limits=UNLIMITED)
        with pytest.raises(ConstraintError, match='limits="unlimited"'):
            check_update_expert(**call, limits=RELAXED)


def test_rank_and_world_must_be_said_by_rank():
    """Their defaults are -1 (§1.2), which only mode 1 takes."""
    parameters = inspect.signature(check_update_expert).parameters
    defaults = [parameters[name].default for name in ("local_rank_id", "world_size", "balance_mode")]
    assert defaults == [-1, -1, 0]
    ids, table = TensorSpec((4, 1), "int32"), TensorSpec((4, 2), "int32")
    check_update_expert(expert_ids=ids, eplb_table=table, balance_mode=1)
    with pytest.raises(ConstraintError, match="`world_size` is -1"):
        check_update_expert(expert_ids=ids, eplb_table=table)


def test_inference_looks_at_nothing_but_the_dims():
    ids, mask = infer_update_expert(TensorSpec((32, 8), "anything"), TensorSpec((0, 0), "complex64"))
    assert (ids, mask) == (TensorSpec((32, 8), "anything"), TensorSpec((32, 8), "bool"))
    with pytest.raises(ConstraintError, match="`expert_ids` is int32"):
        infer_update_expert(TensorSpec((32,), "int32"), TensorSpec((256, 4), "int32"))
    with pytest.raises(ConstraintError, match="`eplb_table` is int32"):
        infer_update_expert(TensorSpec((32, 8), "int32"), TensorSpec((256,), "int32"))


def test_a_threshold_in_bfloat16_is_inferred_but_not_run():
    """The fake-tensor test of §8.1 passes one; tiling needs float32."""
    call = {
        "expert_ids": TensorSpec((32, 8), "int32"),
        "eplb_table": TensorSpec((256, 4), "int32"),
        "expert_scales": TensorSpec((32, 8), "bfloat16"),
        "pruning_threshold": TensorSpec((8,), "bfloat16"),
    }
    with pytest.raises(UnsupportedTypeError, match="`pruning_threshold` is bfloat16"):
        check_update_expert(**call, local_rank_id=0, world_size=8)
