"""The three sets of limits, their names, and what an error says about them."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from dataclasses import fields, replace

import pytest

import evenmoe.contract
from evenmoe.contract.limits import ATLAS_A3, RELAXED, UNLIMITED, Limits, Range, resolve_limits
from evenmoe.errors import ConstraintError, UnsupportedTypeError


def test_the_bounds_of_atlas_a3():
    """§1.6 (new and old column), §2.2, §4."""
    documented = Limits(
        name="atlas-a3",
        tokens=Range(1, 512),
        hidden=Range(1024, 8192),
        top_k=Range(1, 16),
        logical_experts=Range(1, 1024),
        update_world_size=Range(2, 768),
        table_columns_by_token=Range(2, 769),
        table_columns_within_world=True,
        old_logical_experts=Range(1, 512),
        old_update_world_size=Range(2, 384),
        ep_world_size=Range(2, 768),
        physical_experts=Range(1, 1024),
        experts_times_ranks=Range(1, 2048),
        shared_experts=Range(0, 4),
        full_mesh_tokens=Range(0, 256),
        full_mesh_top_k=Range(0, 12),
        token_dtypes=("bfloat16", "float16"),
        rms_norm_dtypes=("bfloat16",),
        tp_send_counts_needed=True,
        lengths_times_tp=True,
    )
    assert documented == ATLAS_A3


def ranges(limits):
    return {
        field.name: getattr(limits, field.name)
        for field in fields(limits)
        if isinstance(getattr(limits, field.name), Range)
    }


def test_the_relaxed_limits_keep_the_chips_maxima_and_lifts_minima():
    for name, chip in ranges(ATLAS_A3).items():
        relaxed, unlimited = getattr(RELAXED, name), getattr(UNLIMITED, name)
        assert relaxed.high == chip.high
        assert unlimited.low <= relaxed.low <= chip.low
        assert unlimited.high is None
    lifted = {name: bound.low for name, bound in ranges(RELAXED).items() if bound != getattr(ATLAS_A3, name)}
    assert lifted == {"tokens": 0, "hidden": 1, "update_world_size": 1, "old_update_world_size": 1, "ep_world_size": 1}


@pytest.mark.parametrize(
    ("name", "limits"),
    [("atlas-a3", ATLAS_A3), ("relaxed", RELAXED), ("unlimited", UNLIMITED), (None, UNLIMITED), (RELAXED, RELAXED)],
)
def test_names_resolve(name, limits):
    assert resolve_limits(name) is limits


def test_the_old_name_of_the_relaxed_limits_says_the_new_one():
    with pytest.raises(ConstraintError) as caught:
        resolve_limits("laptop")
    assert str(caught.value) == (
        '`limits` is \'laptop\': it must be "atlas-a3", "relaxed", "unlimited" or a Limits; '
        'use "relaxed", its new name.'
    )


@pytest.mark.parametrize("name", ["a3", "", "RELAXED", 3])
def test_another_name_lists_the_three(name):
    with pytest.raises(
        ConstraintError, match=r'`limits` is .*: it must be "atlas-a3", "relaxed", "unlimited" or a Limits'
    ):
        resolve_limits(name)


def test_limits_of_ones_own_are_taken_and_named():
    mine = replace(RELAXED, name="my-box", tokens=Range(0, 4), token_dtypes=("float32",))
    assert resolve_limits(mine) is mine
    with pytest.raises(ConstraintError, match='use 0 to 4, or lift this bound of my-box with limits="relaxed"'):
        mine.check("tokens", 5, "x", "of 5 tokens", "must have {} tokens", "use {}")
    with pytest.raises(UnsupportedTypeError, match='use float32, or lift this bound of my-box with limits="relaxed"'):
        mine.check_dtype("token_dtypes", "float16", "x", "float16 (1, 1)")


def test_what_no_limits_take_promises_no_lift():
    with pytest.raises(
        ConstraintError, match=r"`x` is of -1 tokens: it must have at least 0 tokens; use at least 0\.$"
    ):
        UNLIMITED.check("tokens", -1, "x", "of -1 tokens", "must have {} tokens", "use {}")


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(evenmoe.contract.__path__)])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"evenmoe.contract.{module}"))
    assert result.failed == 0
    # distribute is an inner piece; its examples are the operators'.
    assert result.attempted > 0 or module == "distribute"
