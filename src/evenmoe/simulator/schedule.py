"""When plans are made: the first one, those after it, and what of the past they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from evenmoe.evidence import paired_gain
from evenmoe.planner.options import whole_number

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

#: Steps between plans where an engine is left to itself: vLLM's step_interval (0.33).
HORIZON = 3000
_WARMUP_PARTS, _MOST_WINDOW = 3, 1000  # vLLM's window_size


@dataclass(frozen=True)
class Schedule:
    """When policies plan that do not say.

    Attributes:
        num_steps: N, of the replay.
        first: the step before which the first plan is made.
        refresh: steps between plans.
        window: past steps that a plan is made from.
        horizon: steps over which the copies of the first plan are charged.
        copy_overlap: whether experts are copied beside the steps.
        why: how `refresh` was chosen.
    """

    num_steps: int
    first: int
    refresh: int
    window: int
    horizon: int
    copy_overlap: bool
    why: str

    @property
    def once(self) -> bool:
        """Whether the replay ends before a second plan."""
        return self.first + self.refresh >= self.num_steps


def make_schedule(
    num_steps: int,
    refresh: int | None,
    window: int | None,
    horizon: int | None,
    copy_overlap: bool,
    engine: Engine | None = None,
) -> Schedule:
    """The schedule of a replay; `refresh`, `window` and `horizon` are None where they are not given.

    For an engine that plans at an interval, that is `refresh` and `horizon`.

    Raises:
        ConstraintError: a number that is not whole, or below 1.

    >>> make_schedule(60, None, None, 3000, True).first, make_schedule(60, 10, 5, 3000, True).first
    (20, 10)
    """
    interval = None if engine is None else engine.interval
    horizon = interval or HORIZON if horizon is None else whole_number("horizon", horizon, 1)
    if refresh is not None:
        refresh = whole_number("refresh", refresh, 1)
        window = refresh if window is None else whole_number("window", window, 1)
        return Schedule(num_steps, refresh, refresh, window, horizon, copy_overlap, "given")
    if window is None:
        window = min(_MOST_WINDOW, max(1, num_steps // _WARMUP_PARTS))
    window = whole_number("window", window, 1)
    if engine is not None and interval is not None:
        return Schedule(num_steps, window, interval, window, horizon, copy_overlap, f"{engine.name}'s own interval")
    return Schedule(num_steps, window, horizon, window, horizon, copy_overlap, "the horizon")


#: A trial of plans at these intervals, the first plan before step `first`, in the steps before step `until`: for each,
#: microseconds of every step from `first` on, copying included, float64 (until - first,).
Trial = Callable[[int, int, list[int]], list[np.ndarray]]


def choose_refresh(schedule: Schedule, trial: Trial) -> Schedule:
    """The schedule with the interval that pays in the warm-up, or else as it is, with one plan for the whole horizon.

    The first half of the warm-up makes a plan. In the second half, plans at a half, a quarter and an eighth of its
    length are tried beside that plan alone, each made from as many steps; copies are charged. Of the intervals that are
    shown to be faster (`evenmoe.evidence`, at one in a hundred for all of them), the fastest is taken: only where what
    is busy changes so much in so few steps that new plans have earned more than their copies cost.
    """
    half = schedule.first // 2
    intervals = sorted({-(-half // parts) for parts in (2, 4, 8)} - {half}, reverse=True)
    if schedule.first >= schedule.num_steps or not intervals or half < 2:
        return schedule
    once, *others = trial(half, schedule.first, [schedule.first, *intervals])
    gains = [paired_gain(once, times, comparisons=len(others)) for times in others]
    shown = [n for n, gain in enumerate(gains) if gain.is_significant]
    if not shown:
        return replace(schedule, why="the horizon: in the warm-up no shorter interval is shown to pay")
    best = min(shown, key=lambda n: float(others[n].mean()))
    why = f"in the warm-up {gains[best].percent:.1f} % faster than one plan, copying included"
    return replace(schedule, refresh=intervals[best], why=why)
