"""Plans for the loads that a replica rule really produces, which need not be an even share for every replica."""

from __future__ import annotations

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement


def plan_for_rule(
    load: FloatArray,
    num_ranks: int,
    num_slots: int,
    rule: str,
    previous: Placement | None = None,
    max_copies: int | None = None,
    seed: int = 0,
) -> Placement:
    """The placement that is best under `rule`.

    "rank" reaches only some replica counts, with uneven shares: see `rank_rule`. "batch" is judged after the best
    split: see `batch`. "token" and "occurrence" are planned as "even": by occurrence the shares are even already with
    few tokens, by token in the limit of many (T tokens on each rank load the first T mod count replicas of an expert
    by one more per rank, so a decode step with one token per rank puts everything on replica 0, whatever the plan).

    Args:
        load: float64 (L, E), or windows (T, L, E).
        rule: "even", "rank", "token", "occurrence" or "batch".
        num_ranks, num_slots, previous, max_copies, seed: as in `plan`.

    Raises:
        ConstraintError: a rule that there is not.
    """
    if rule == "batch":
        from evenmoe.planner.batch import plan_batch

        slots = plan_batch(load, num_ranks, num_slots, previous, max_copies, seed)
        return _in_the_slots_of(previous, Placement(slots, num_ranks, num_experts=load.shape[-1]))
    if rule == "rank":
        from evenmoe.planner.rank_rule import plan_rank_rule

        return _in_the_slots_of(previous, plan_rank_rule(load, num_ranks, num_slots, previous, max_copies))
    if rule in ("even", "token", "occurrence"):
        from evenmoe.planner.plan import plan  # which comes here only for the other rules

        return plan(load, num_ranks=num_ranks, num_slots=num_slots, previous=previous, max_copies=max_copies, seed=seed)
    raise ConstraintError(
        "rule",
        repr(rule),
        'must be "even", "rank", "token", "occurrence" or "batch"',
        "use the rule that update_expert will be called with",
    )


def _in_the_slots_of(previous: Placement | None, placement: Placement) -> Placement:
    """The same placement with every expert that stays on its rank in the slot where it was."""
    if previous is None:
        return placement
    slots, index = placement.slot_to_expert.copy(), placement.replica_index.copy()
    width = placement.slots_per_rank
    for layer in range(placement.num_layers):
        before = previous.slot_to_expert[layer]
        for slot in np.flatnonzero(slots[layer] != before):
            rank = slice(slot // width * width, (slot // width + 1) * width)
            there = np.flatnonzero((slots[layer, rank] == before[slot]) & (slots[layer, rank] != before[rank]))
            if there.size:
                pair, swapped = [slot, rank.start + there[0]], [rank.start + there[0], slot]
                slots[layer, pair] = slots[layer, swapped]
                index[layer, pair] = index[layer, swapped]
    return Placement(slots, placement.num_ranks, num_experts=placement.num_experts, replica_index=index)
