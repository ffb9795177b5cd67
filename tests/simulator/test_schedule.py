"""When plans are made that nobody has asked for at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.simulator.schedule import choose_refresh, make_schedule
from tests.simulator.test_headline import EXPERTS, ROWS, SKEWED, routed, run


def interval(trace, **options) -> tuple[int, str]:
    settings = {name: value for name, value, _ in run(trace, ["evenmoe:rule=even"], **options).settings}
    return int(settings["refresh every"]), settings["refresh chosen"]


def drifting(steps: int, period: int) -> np.ndarray:
    """Every `period` steps another four experts are busy."""
    popularity = np.ones((steps, EXPERTS))
    for step in range(steps):
        popularity[step, np.random.default_rng(step // period).permutation(EXPERTS)[:4]] = 9.0
    return popularity


def test_a_steady_load_is_planned_once():
    assert interval(routed(SKEWED)) == (3000, "the horizon: in the warm-up no shorter interval is shown to pay")
    assert interval(routed(SKEWED), horizon=70)[0] == 70


def test_a_load_that_drifts_is_planned_again_where_copies_allow_it():
    trace = routed(drifting(120, 10), 120)
    steps, why = interval(trace)
    assert steps in (3, 5, 10)  # of 40 steps of warm-up, 20 make the first plan
    assert why.startswith("in the warm-up ")
    assert why.endswith(" % faster than one plan, copying included")
    dear = replace(ROWS, copy_bytes=1e12)
    assert interval(trace, costs=dear, copy_overlap=False)[0] == 3000


def test_what_is_tried_is_causal():
    """What comes after the warm-up does not change the choice."""
    popularity = drifting(120, 10)
    calm = popularity.copy()
    calm[40:] = SKEWED
    assert interval(routed(popularity, 120)) == interval(routed(calm, 120))


def test_the_fastest_of_those_that_are_shown_is_taken():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 20)
    calls = []

    def trial(first, until, intervals):
        calls.append((first, until, intervals))
        return [10 + noise, 9 + noise, 8 + noise + random.normal(0, 0.01, 20), 9.9 + random.normal(0, 3, 20)]

    schedule = make_schedule(120, None, None, 3000, True)
    assert choose_refresh(schedule, trial).refresh == 5
    assert calls == [(20, 40, [40, 10, 5, 3])]
    assert choose_refresh(schedule, lambda *_: [10 + noise] * 4) == replace(
        schedule, why="the horizon: in the warm-up no shorter interval is shown to pay"
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 11])
def test_a_short_warm_up_tries_nothing(steps):
    schedule = make_schedule(steps, None, None, 3000, True)
    assert choose_refresh(schedule, lambda *_: pytest.fail("tried")) == schedule


def test_a_warm_up_is_a_third_at_most_a_window_of_vllm():
    assert [make_schedule(steps, None, None, 3000, True).first for steps in (1, 2, 3, 8, 3000, 10**6)] == [
        1, 1, 1, 2, 1000, 1000,
    ]  # fmt: skip
    assert make_schedule(100, None, 7, 3000, True).first == 7
    given = make_schedule(100, 10, None, 3000, True)
    assert (given.first, given.refresh, given.window, given.once) == (10, 10, 10, False)
