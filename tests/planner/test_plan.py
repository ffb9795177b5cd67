"""`plan`, the entry: what it refuses, in which words, and what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.rules import RULES

LOAD = np.random.default_rng(0).lognormal(3, 1, (2, 24))
USED = em.plan(LOAD, num_ranks=4, num_slots=28)
PLAIN = {"num_ranks": 4, "num_slots": 28}


@pytest.mark.parametrize(
    ("changed", "argument", "says"),
    [
        (
            {"num_slots": 20},
            "num_slots",
            "each of the 24 experts at least once .* 4 ranks; the nearest that works is 24",
        ),
        ({"num_slots": 30}, "num_slots", "the nearest that work are 28 and 32"),
        ({"num_slots": 25}, "num_slots", "the nearest that work are 24 and 28"),
        ({"num_ranks": 5, "num_slots": 24}, "num_slots", "the nearest that works is 25"),
        ({"num_ranks": 0}, "num_ranks", "at least 1"),
        ({"num_ranks": 4.0}, "num_ranks", "of type float: it must be a whole number"),
        ({"num_slots": None}, "num_slots", "must be a whole number"),
        ({"num_nodes": 3}, "num_nodes", "divide the 4 ranks evenly; the nearest that work are 2 and 4"),
        (
            {"num_nodes": 2, "num_groups": 3},
            "num_groups",
            "multiple of the 2 nodes .* the nearest that work are 2 and 4",
        ),
        ({"num_nodes": 2, "num_groups": 48}, "num_groups", "the nearest that works is 24"),
        ({"num_nodes": 0}, "num_nodes", "at least 1"),
        ({"num_groups": -1}, "num_groups", "at least 1"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"rule": "random"}, "rule", f"'random': it must be one of {', '.join(RULES)}"),
        ({"previous": [[0, 1]]}, "previous", "of type list: it must be a Placement"),
        (
            {"previous": em.plan(LOAD, num_ranks=4, num_slots=32), "rule": "batch"},
            "previous",
            "4 ranks, 8 x4 slots: it must be of the same ranks and slots to plan for a rule",
        ),
        ({"previous": USED, "max_copies": -1}, "max_copies", "at least 0"),
        ({"previous": USED, "max_copies": 1.5}, "max_copies", "whole number"),
        ({"max_copies": 3}, "max_copies", "needs `previous`"),
        ({"target_par": 1.1}, "target_par", "needs `previous`"),
        ({"previous": USED, "target_par": 0.9}, "target_par", "at least 1.0"),
        ({"previous": USED, "target_par": float("nan")}, "target_par", "at least 1.0"),
        ({"previous": USED, "target_par": 1.1, "rule": "rank"}, "target_par", "needs a rule whose shares are even"),
        (
            {"previous": USED, "num_nodes": 2, "num_groups": 4},
            "previous",
            r"a placement with group 0 of layer 0 on nodes \[0, 1\]: it must keep each group inside one node",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(changed: dict[str, Any], argument: str, says: str) -> None:
    with pytest.raises(ConstraintError, match=says) as caught:
        em.plan(LOAD, **{**PLAIN, **changed})
    assert caught.value.argument == argument


def test_a_placement_with_too_many_groups_on_a_node_is_no_start() -> None:
    used = em.Placement([[0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7]], 2)
    says = "a placement with 3 groups of layer 1 on node 0: it must have 2 groups on each node"
    with pytest.raises(ConstraintError, match=says):
        em.plan(np.ones((2, 8)), num_ranks=2, num_slots=12, num_nodes=2, num_groups=4, previous=used)


def test_groups_that_no_count_can_save() -> None:
    with pytest.raises(ConstraintError, match="23 experts have no such groups: use num_groups=1"):
        em.plan(LOAD[:, :23], num_ranks=4, num_slots=28, num_nodes=2, num_groups=2)


@pytest.mark.parametrize("load", [np.ones(3), np.ones((0, 3)), [[1, -1]], [[1, np.nan]], [[np.inf, 1]]])
def test_loads_that_are_none(load: Any) -> None:
    with pytest.raises(ConstraintError) as caught:
        em.plan(load, num_ranks=1, num_slots=3)
    assert caught.value.argument == "load"
    with pytest.raises(ConstraintError):
        em.lower_bound(load, num_ranks=1, num_slots=3)


@pytest.mark.parametrize("changed", [{"num_slots": 30}, {"num_nodes": 3}, {"num_nodes": 2, "num_groups": 3}])
def test_the_bound_refuses_what_the_plan_refuses(changed: dict[str, int]) -> None:
    options = {**PLAIN, **changed}
    with pytest.raises(ConstraintError) as of_plan:
        em.plan(LOAD, **options)
    with pytest.raises(ConstraintError) as of_bound:
        em.lower_bound(LOAD, **options)
    assert str(of_plan.value) == str(of_bound.value)


def test_every_kind_of_number_and_load_is_taken() -> None:
    plan = em.plan(LOAD, num_ranks=4, num_slots=28)
    assert em.plan(LOAD, num_ranks=np.int64(4), num_slots=np.uint8(28), seed=np.int32(0)) == plan
    whole = np.rint(LOAD * 1000)
    assert em.plan(whole.astype(int).tolist(), num_ranks=4, num_slots=28) == em.plan(whole, num_ranks=4, num_slots=28)


@pytest.mark.parametrize("rule", ["even", "rank", "batch"])
@pytest.mark.parametrize("windows", [LOAD[None], np.stack([LOAD, LOAD[:, ::-1], LOAD])], ids=["load", "windows"])
def test_one_placement_is_built_on_the_way(monkeypatch: pytest.MonkeyPatch, windows: np.ndarray, rule: str) -> None:
    built: list[em.Placement] = []
    whole = em.Placement.__init__

    def counted(self: em.Placement, *given: Any, **named: Any) -> None:
        built.append(self)
        whole(self, *given, **named)

    windows = windows.copy()
    windows[0, 1] *= 0  # so that the layers have tokens in different windows
    monkeypatch.setattr(em.Placement, "__init__", counted)
    for options in ({}, {"previous": USED}, {"previous": USED, "max_copies": 12}):
        plan = em.plan(windows, **PLAIN, rule=rule, **options)
        assert built == [plan]
        built.clear()
