"""Plans for the loads that a replica rule really produces, which need not be an even share for every replica."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray, count_arrivals
from evenmoe.planner import batch, rank_rule
from evenmoe.planner.hierarchical import pack_groups, put_nodes, take_nodes
from evenmoe.planner.options import Shape
from evenmoe.planner.slots import Slots, by_load, lay_over, named, positions, swap_back, take
from evenmoe.slot_arrays import held_by_rank

# By what the rule is planned for. "rank" reaches only some replica counts, with uneven shares; "batch" is judged after
# the best split of a batch.
_PLANNERS = {"rank": rank_rule, "batch": batch}


def plan_for_rule(load: FloatArray, shape: Shape, assumed: str, seed: int = 0) -> Slots:
    """The slots that are best under a rule that is planned for as `assumed`, "rank" or "batch".

    Where groups are kept inside nodes, they are packed into nodes as for even shares; then each node's slots are
    planned for the rule, whose tokens still come from all ranks. `load` is float64 (L, E), or windows (T, L, E).
    """
    members = None
    if shape.is_hierarchical:
        members, _ = pack_groups(load, shape, seed)
        load = take_nodes(load, members)
    order = by_load(load)
    found = _PLANNERS[assumed].plan_anew(take(load, order), shape.node_ranks, shape.node_slots, shape.num_ranks, seed)
    slots = named(found.experts, order)
    if members is not None:
        slots = put_nodes(slots, members)
    return Slots(slots, found.replica_index.reshape(slots.shape))


def improve_for_rule(
    load: FloatArray, shape: Shape, assumed: str, used: Slots, max_copies: int | None, seed: int
) -> Slots:
    """As `plan_for_rule`, from the slots in use, which keep groups inside nodes where the shape does."""
    order = by_load(load)
    load = take(load, order)
    start = Slots(positions(used.experts, order), used.replica_index)
    found = _PLANNERS[assumed].improve_used(load, start, shape, max_copies, seed)
    # A new plan moves nine experts of ten, so below a quarter of the slots it is not worth the time.
    if not shape.is_hierarchical and (max_copies is None or 4 * max_copies >= shape.num_slots):
        found = _or_anew(load, shape, assumed, start, found, max_copies, seed)
    return swap_back(Slots(named(found.experts, order), found.replica_index), used.experts, shape.num_ranks)


def _or_anew(
    load: FloatArray, shape: Shape, assumed: str, start: Slots, found: Slots, max_copies: int | None, seed: int
) -> Slots:
    """`found`, but a new plan for the layers in which that is better, its copies are allowed and, if free, they pay."""
    planner, num_ranks = _PLANNERS[assumed], shape.num_ranks
    price = planner.PRICE_OF_COPY if max_copies is None else 0.0
    reached = planner.mean_peaks(load, found, num_ranks, seed)
    behind = np.flatnonzero(reached > 1 + price * shape.num_slots / 4)
    if not behind.size:
        return found
    part = load[..., behind, :]
    new = lay_over(plan_for_rule(part, shape, assumed, seed), start.experts[behind], num_ranks)
    held = held_by_rank(start.experts[behind], num_ranks, shape.num_experts)
    copies = count_arrivals(held, new.experts)
    gain = reached[behind] - planner.mean_peaks(part, new, num_ranks, seed)
    gain -= price * (copies - count_arrivals(held, found.experts[behind]))
    better = (gain > 0) & (copies <= (shape.num_slots if max_copies is None else max_copies))
    experts, index = found.experts.copy(), found.replica_index.copy()
    experts[behind[better]], index[behind[better]] = new.experts[better], new.replica_index[better]
    return Slots(experts, index)
