"""Planners by name: found wherever they are, given what they take, and never believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.planner import PLANNERS
from evenmoe.planner.options import PlanOptions
from evenmoe.planner.plan import plan_with
from tests.planner import toy_planner

LOAD = np.random.default_rng(0).lognormal(3, 1, (2, 24))
SHAPE = {"num_ranks": 4, "num_slots": 28}
OPTIONS = PlanOptions(**SHAPE)
TOY_FILE = f"py:{Path(toy_planner.__file__)}:plan"


def test_the_planners_that_are_here() -> None:
    assert list(PLANNERS)[:2] == ["evenmoe", "greedy"]
    assert PLANNERS.get("evenmoe") is em.plan


@pytest.mark.parametrize("load", [LOAD, LOAD[None].repeat(3, axis=0)], ids=["load", "windows"])
def test_evenmoe_is_the_plan(load) -> None:
    used = em.plan(LOAD[:, ::-1], **SHAPE)
    for more in (
        {},
        {"rule": "rank", "seed": 3},
        {"previous": used, "max_copies": 4},
        {"num_nodes": 2, "num_groups": 4},
    ):
        assert plan_with("evenmoe", load, PlanOptions(**SHAPE, **more)) == em.plan(load, **SHAPE, **more)


@pytest.mark.parametrize("planner", [toy_planner.plan, "py:tests.planner.toy_planner:plan", TOY_FILE])
def test_a_users_own(planner) -> None:
    placement = plan_with(planner, LOAD, PlanOptions(**SHAPE, num_nodes=2, rule="rank", seed=3))
    assert placement == toy_planner.plan(LOAD, **SHAPE)
    assert np.array_equal(placement.slot_to_expert[:, [0, 7]], np.argsort(-LOAD, axis=1)[:, :2])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_nodes": 2, "num_groups": 4}, "which takes no `num_nodes`: it must take it to plan with 2"),
        ({"previous": em.plan(LOAD, **SHAPE)}, "which takes no `previous`"),
    ],
)
@pytest.mark.parametrize("planner", ["py:tests.planner.toy_planner:plan"])
def test_an_option_that_a_planner_would_ignore_is_an_error(planner, more, says) -> None:
    with pytest.raises(ConstraintError, match=says) as caught:
        plan_with(planner, LOAD, PlanOptions(**SHAPE, **more))
    assert caught.value.argument == "planner"


USED = em.plan(LOAD, **SHAPE, num_nodes=2, num_groups=4)


@pytest.mark.parametrize(
    ("planned", "says"),
    [
        (USED.slot_to_expert, "whose plan is of type ndarray: it must be a Placement"),
        (em.plan(LOAD, num_ranks=2, num_slots=28), "whose plan is a placement of .* 28 slots, 2 ranks"),
        (em.plan(LOAD[:, ::-1], **SHAPE), r"a placement with group \d of layer 0 on nodes \[0, 1\]"),
        (
            em.plan(LOAD[:, ::-1], **SHAPE, num_nodes=2, num_groups=4),
            r"whose plan makes \d+ copies in one layer: it must make at most 2",
        ),
    ],
)
def test_what_a_planner_returns_is_checked(planned, says) -> None:
    options = PlanOptions(**SHAPE, num_nodes=2, num_groups=4, previous=USED, max_copies=2)
    with pytest.raises(ConstraintError, match=says) as caught:
        plan_with(lambda load, **options: planned, LOAD, options)
    assert caught.value.argument == "planner"


def test_options_are_checked_before_the_planner_is_asked() -> None:
    with pytest.raises(ConstraintError, match="the nearest that work are 28 and 32"):
        plan_with("greedy", LOAD, PlanOptions(num_ranks=4, num_slots=30))
    with pytest.raises(ConstraintError, match="must be one of evenmoe, greedy, or py:module:attribute"):
        plan_with("best", LOAD, OPTIONS)


def test_a_planner_that_fails_is_no_mistake_in_evenmoe() -> None:
    def broken(load, **options):
        raise ValueError("no room")

    with pytest.raises(ConstraintError, match="must not fail, and raised ValueError: no room; correct it") as caught:
        plan_with(broken, LOAD, OPTIONS)
    assert isinstance(caught.value.__cause__, ValueError)

    def leaving(load, **options):
        raise SystemExit

    with pytest.raises(ConstraintError, match="must not fail, and raised SystemExit; correct it"):
        plan_with(leaving, LOAD, OPTIONS)
    with pytest.raises(ConstraintError, match="`planner` is py:builtins:dict: it must not fail, and raised ValueError"):
        plan_with("py:builtins:dict", LOAD, OPTIONS)  # which has no signature


def test_a_mistake_in_evenmoe_is_not_said_to_be_the_planners(monkeypatch) -> None:
    def broken(*_):
        raise ZeroDivisionError("one by none")

    monkeypatch.setattr("evenmoe.planner.plan._plan_anew", broken)
    with pytest.raises(ZeroDivisionError):
        plan_with("evenmoe", LOAD, OPTIONS)


def test_a_planner_may_write_to_its_load() -> None:
    def careless(load, **options):
        load[:] = 1
        return em.plan(load, **options)

    load = LOAD.copy()
    plan_with(careless, load, OPTIONS)
    assert np.array_equal(load, LOAD)
