"""The sets of limits, their names, and what an error says about them."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from dataclasses import fields, replace

import pytest

import evenmoe.contract
from evenmoe.contract.limits import (
    ATLAS_A3,
    ATLAS_A3_2025,
    ATLAS_A3_2026,
    RELAXED,
    UNLIMITED,
    Limits,
    Range,
    resolve_limits,
)
from evenmoe.errors import ConstraintError, UnsupportedTypeError

BOTH_RELEASES = {
    "tokens": Range(1, 512),
    "hidden": Range(1024, 8192),
    "top_k": Range(1, 16),
    "logical_experts": Range(1, 1024),
    "update_world_size": Range(2, 768),
    "table_columns_by_token": Range(2, 769),
    "table_columns_within_world": True,
    "old_logical_experts": Range(1, 512),
    "old_update_world_size": Range(2, 384),
    "ep_world_size": Range(2, 768),
    "physical_experts": Range(1, 1024),
    "experts_times_ranks": Range(1, 2048),
    "shared_experts": Range(0, 4),
    "full_mesh_tokens": Range(0, 256),
    "full_mesh_top_k": Range(0, 12),
    "hierarchy_ranks": Range(16, 256, 16),
    "hierarchy_experts": Range(1, 512),
    "hierarchy_tokens": Range(1, 256),
    "hierarchy_hidden": Range(32, 7168, 32),
    "v1_ep_world_size": Range(8, 288, 8),
    "v1_physical_experts": Range(1, 512),
    "v1_hidden": Range(7168, 7168),
    "v1_top_k": Range(1, 8),
    "token_dtypes": ("bfloat16", "float16"),
    "rms_norm_dtypes": ("bfloat16",),
}
NAMES = '"atlas-a3", "atlas-a3-2025", "atlas-a3-2026", "relaxed", "unlimited" or a Limits'
FULL_MESH = ("", "fullmesh_v1", "fullmesh_v2")


def test_the_bounds_of_december_2025():
    """§1.6 (new and old column), §2.2, §4."""
    assert (
        Limits(
            name="atlas-a3-2025",
            **BOTH_RELEASES,
            tp_world_size=Range(0, 2),
            comm_algs=FULL_MESH,
            full_mesh_alone=True,
            const_alpha_dims=(2,),
            tp_arguments_reserved=False,
            lengths_times_tp=True,
            assist_info_per_row=3,
            expand_scales="unwritten",
        )
        == ATLAS_A3_2025
    )


def test_the_bounds_of_july_2026():
    """§2.16."""
    assert (
        Limits(
            name="atlas-a3-2026",
            **BOTH_RELEASES,
            tp_world_size=Range(0, 1),
            comm_algs=(*FULL_MESH, "hierarchy"),
            full_mesh_alone=False,
            const_alpha_dims=(2,),
            tp_arguments_reserved=True,
            lengths_times_tp=False,
            assist_info_per_row=128,
            expand_scales="required",
        )
        == ATLAS_A3_2026
    )


def test_the_bounds_of_either_release():
    """What one of the two takes, and the alphas of November 2025."""
    assert (
        Limits(
            name="atlas-a3",
            **BOTH_RELEASES,
            tp_world_size=Range(0, 2),
            comm_algs=(*FULL_MESH, "hierarchy"),
            full_mesh_alone=False,
            const_alpha_dims=(1, 2),
            tp_arguments_reserved=True,
            lengths_times_tp=True,
            assist_info_per_row=3,
            expand_scales="optional",
        )
        == ATLAS_A3
    )


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
        assert relaxed.step == 1
        assert unlimited.high is None or name == "tp_world_size"  # peers are two
    lifted = {name: bound.low for name, bound in ranges(RELAXED).items() if bound != getattr(ATLAS_A3, name)}
    assert lifted == {
        "tokens": 0,
        "hidden": 1,
        "update_world_size": 1,
        "old_update_world_size": 1,
        "ep_world_size": 1,
        "hierarchy_ranks": 1,
        "hierarchy_tokens": 0,
        "hierarchy_hidden": 1,
        "v1_ep_world_size": 1,
        "v1_hidden": 1,
    }


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("atlas-a3", ATLAS_A3),
        ("atlas-a3-2025", ATLAS_A3_2025),
        ("atlas-a3-2026", ATLAS_A3_2026),
        ("relaxed", RELAXED),
        ("unlimited", UNLIMITED),
        (None, UNLIMITED),
        (RELAXED, RELAXED),
    ],
)
def test_names_resolve(name, limits):
    assert resolve_limits(name) is limits


def test_the_old_name_of_the_relaxed_limits_says_the_new_one():
    with pytest.raises(ConstraintError) as caught:
        resolve_limits("laptop")
    assert str(caught.value) == (f"`limits` is 'laptop': it must be {NAMES}; use \"relaxed\", its new name.")


@pytest.mark.parametrize("name", ["a3", "", "RELAXED", 3])
def test_another_name_lists_them(name):
    with pytest.raises(
        ConstraintError,
        match=f"`limits` is .*: it must be {NAMES}; use one of these names",
    ):
        resolve_limits(name)


def test_limits_of_ones_own_are_taken_and_named():
    mine = replace(RELAXED, name="my-box", tokens=Range(0, 4), token_dtypes=("float32",))
    assert resolve_limits(mine) is mine
    with pytest.raises(ConstraintError, match='use 0 to 4, or lift this bound of my-box with limits="atlas-a3"'):
        mine.check("tokens", 5, "x", "of 5 tokens", "must have {} tokens", "use {}")
    with pytest.raises(UnsupportedTypeError, match='use float32, or lift this bound of my-box with limits="atlas-a3"'):
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
