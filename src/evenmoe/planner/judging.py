"""What a plan does to tokens that it was not made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.evidence import HeldOut, PairedGain, Verdict, centered_on, hold_out, judge, par_gain, unevenness
from evenmoe.metrics import FloatArray, as_load, of_holders, within_range
from evenmoe.placement import Placement
from evenmoe.planner import Planner
from evenmoe.planner.options import PlanOptions
from evenmoe.planner.plan import plan_with
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule


@dataclass(frozen=True)
class JudgedPlan:
    """A plan of one part of a recording, judged on the other.

    Attributes:
        held_out: both parts.
        placement: planned on the first.
        rank_loads: assignments of each rank with a slot in the second, float64 (windows, L, G), under the placement.
        in_use: what it is compared with, or None; and the rank loads under it.
        verdict: what the evidence allows to be said; None where there is nothing to compare with.
    """

    held_out: HeldOut
    placement: Placement
    rank_loads: FloatArray
    in_use: Placement | None = None
    rank_loads_in_use: FloatArray | None = None
    verdict: Verdict | None = None


def judge_plan(
    load: npt.ArrayLike,
    options: PlanOptions,
    in_use: Placement | None,
    *,
    planner: str | Planner = "evenmoe",
    mean: bool = False,
    in_slot_order: bool = False,
    routing: npt.NDArray[np.integer] | None = None,
    seq_start: npt.NDArray[np.integer] | None = None,
) -> JudgedPlan:
    """Plan on the first part of a recording and compare the placement with the one in use on the last part.

    Args:
        load: tokens per logical expert, (T, L, E).
        options: of the plan, whose rule decides in both parts.
        in_use: the placement to compare with, of the same layers and experts; or None.
        planner: as in `plan_with`.
        mean: plan on the sum of the first part, in place of its windows.
        in_slot_order: whether an expert's replicas count in the order of their slots, as most formats have them.
        routing, seq_start: as in `hold_out`.

    Raises:
        ConstraintError: as `plan_with` and `hold_out`.

    Expert 0 is always the busiest, so a plan of the first windows helps in the last ones:

    >>> from evenmoe.placement import default_placement
    >>> load = [[[600 + window, 200, 100, 100]] for window in range(9)]
    >>> judged = judge_plan(load, PlanOptions(num_ranks=2, num_slots=4), default_placement(1, 4, 2))
    >>> judged.verdict.kind, round(judged.verdict.gain.percent, 1), judged.held_out.words
    ('gain', 12.4, 'planned on the first 6 windows, judged on the last 3')
    """
    tokens = within_range(as_load(load))
    held = hold_out(tokens, routing, seq_start)
    goal = held.planned.sum(axis=0) if mean or len(held.planned) == 1 else held.planned
    placement = plan_with(planner, goal, options)
    if in_slot_order:
        placement = without_order(placement)
    after = rank_loads_of(held.judged, placement, options.rule)
    if in_use is None:
        return JudgedPlan(held, placement, after)
    before = rank_loads_of(held.judged, in_use, options.rule)
    # What is in use was not planned on any of these windows: all of them show how uneven it is.
    variance = held.variance if held.unit == "assignments" else 1.0
    uneven = unevenness(rank_loads_of(tokens, in_use, options.rule), variance=variance)
    verdict = judge(gain_on_unseen(held, in_use, placement, options.rule), uneven)
    return JudgedPlan(held, placement, after, in_use, before, verdict)


def without_order(placement: Placement) -> Placement:
    """The placement with every expert's replicas in the order of their slots.

    >>> placement = Placement([[0, 1, 0, 2]], num_ranks=2, replica_index=[[1, 0, 0, 0]])
    >>> without_order(placement).replica_index.tolist()
    [[0, 0, 1, 0]]
    """
    return Placement(
        placement.slot_to_expert,
        placement.num_ranks,
        num_experts=placement.num_experts,
        rank_sizes=placement.rank_sizes,
    )


def gain_on_unseen(held: HeldOut, before: Placement, after: Placement, rule: str | Rule) -> PairedGain:
    """By how much the mean PAR of the judged windows falls from one placement to another."""
    gain = par_gain(*(rank_loads_of(held.judged, each, rule) for each in (before, after)))
    if held.compared is held.judged:
        return gain
    parts = (rank_loads_of(held.compared, each, rule) for each in (before, after))
    return centered_on(par_gain(*parts, variance=held.variance), gain.percent)


def rank_loads_of(load: FloatArray, placement: Placement, rule: str | Rule) -> FloatArray:
    """Assignments of every rank that has a slot, float64 (T, L, G).

    They are counted a few windows at a time: slots are many where ranks are few.
    """
    chosen = RULES.get(rule)
    at_once = max(1, (1 << 22) // placement.slot_to_expert.size)
    parts = range(0, len(load), at_once)
    loads = np.concatenate([chosen.rank_loads(load[first : first + at_once], placement) for first in parts])
    return of_holders(loads, placement)
