"""When plans are made: the first one, those after it, and what of the past they see."""

from __future__ import annotations

from dataclasses import dataclass

from evenmoe.planner.options import whole_number

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
    num_steps: int, refresh: int | None, window: int | None, horizon: int, copy_overlap: bool
) -> Schedule:
    """The schedule of a replay; `refresh` and `window` are None where they are not given.

    Raises:
        ConstraintError: a number that is not whole, or below 1.

    >>> make_schedule(60, None, None, 3000, True).first, make_schedule(60, 10, 5, 3000, True).first
    (20, 10)
    """
    horizon = whole_number("horizon", horizon, 1)
    if refresh is not None:
        refresh = whole_number("refresh", refresh, 1)
        window = refresh if window is None else whole_number("window", window, 1)
        return Schedule(num_steps, refresh, refresh, window, horizon, copy_overlap, "given")
    if window is None:
        window = min(_MOST_WINDOW, max(1, num_steps // _WARMUP_PARTS))
    window = whole_number("window", window, 1)
    return Schedule(num_steps, window, horizon, window, horizon, copy_overlap, "the horizon")
