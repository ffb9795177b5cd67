"""What a plan does to tokens that it was not made from: a gain is claimed where there is one, and seldom where not."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe import plan
from evenmoe.evidence import hold_out
from evenmoe.metrics import peak_to_average
from evenmoe.placement import default_placement
from evenmoe.planner.judging import judge_plan, rank_loads_of
from evenmoe.planner.options import PlanOptions
from evenmoe.rules import RULES

RANKS, EXPERTS, LAYERS = 4, 8, 3
IN_USE = default_placement(LAYERS, EXPERTS, RANKS)


def recorded(seed: int, windows: int, size: int, skew: float) -> np.ndarray:
    """Independent assignments of a router that prefers the first rank's experts `1 + skew` times, in all windows."""
    chances = np.ones((LAYERS, EXPERTS))
    chances[:, : EXPERTS // RANKS] += skew
    chances /= chances.sum(axis=1, keepdims=True)
    return np.random.default_rng(seed).multinomial(size, chances, size=(windows, LAYERS))


def verdict_of(load: np.ndarray, slots: int = EXPERTS):
    found = judge_plan(load, PlanOptions(RANKS, slots), IN_USE).verdict
    assert found is not None
    return found


@pytest.mark.parametrize(("windows", "size"), [(1, 40), (1, 4000), (2, 400), (9, 12), (12, 900)])
def test_a_balanced_router_is_left_alone(windows, size):
    """20 recordings a case: with a true rate of at most 1 %, more than two claims have a chance of 1e-3."""
    claims = sum(verdict_of(recorded(seed, windows, size, 0.0), EXPERTS + RANKS).kind == "gain" for seed in range(20))
    assert claims <= 2


@pytest.mark.parametrize(("windows", "size"), [(1, 20_000), (2, 4000), (6, 4000), (12, 900)])
def test_a_lasting_skew_is_found(windows, size):
    """Two experts of eight have three times the others' tokens: the first rank has twice its share."""
    assert all(verdict_of(recorded(seed, windows, size, 2.0)).kind == "gain" for seed in range(20))


def test_the_judged_plan_has_seen_the_first_part_alone():
    load = recorded(0, 9, 500, 2.0)
    found = judge_plan(load, PlanOptions(RANKS, 12), IN_USE)
    assert found.placement == plan(load[:6], num_ranks=RANKS, num_slots=12)
    before, after = (peak_to_average(load[6:], each).mean() for each in (IN_USE, found.placement))
    assert found.verdict is not None
    assert found.verdict.gain.percent == pytest.approx(100 * (1 - after / before), abs=1e-9)  # sums of 9 numbers


@pytest.mark.parametrize("windows", [1, 2])
def test_the_gain_shown_is_that_of_the_whole_rest(windows):
    load = recorded(0, windows, 5000, 2.0)
    found = judge_plan(load, PlanOptions(RANKS, 12), IN_USE, mean=True)
    judged = hold_out(load).judged
    before, after = (peak_to_average(judged, each).mean() for each in (IN_USE, found.placement))
    assert found.verdict is not None
    assert found.verdict.gain.percent == pytest.approx(100 * (1 - after / before), abs=1e-9)


def test_nothing_in_use_is_no_verdict():
    found = judge_plan(recorded(0, 9, 500, 2.0), PlanOptions(RANKS, 12), None)
    assert (found.verdict, found.rank_loads_in_use) == (None, None)
    assert found.rank_loads.shape == (3, LAYERS, RANKS)


@pytest.mark.parametrize("rule", ["even", "rank", "batch"])
def test_rank_loads_in_parts_are_those_in_one(monkeypatch, rule):
    load, placement = (
        recorded(0, 7, 300, 2.0).astype(float),
        plan(recorded(0, 1, 300, 2.0), num_ranks=RANKS, num_slots=12),
    )
    assert np.array_equal(rank_loads_of(load, placement, rule), RULES.get(rule).rank_loads(load, placement))
