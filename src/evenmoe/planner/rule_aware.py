"""Plans for the loads that a replica rule really produces, which need not be an even share for every replica."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, count_copies, peak_over_mean
from evenmoe.placement import Placement, layers_of
from evenmoe.planner import batch, rank_rule
from evenmoe.planner._renaming import rename_ranks
from evenmoe.planner.batch import improve_batch, judge_batch, plan_batch
from evenmoe.planner.hierarchical import pack_groups, put_nodes, take_nodes
from evenmoe.planner.options import Shape
from evenmoe.planner.rank_rule import improve_rank_rule, plan_rank_rule
from evenmoe.rules.catalogue import RULES


def plan_for_rule(
    load: FloatArray,
    shape: Shape,
    rule: str,
    previous: Placement | None = None,
    max_copies: int | None = None,
    seed: int = 0,
) -> Placement:
    """The placement that is best under `rule`.

    "rank" reaches only some replica counts, with uneven shares: see `rank_rule`. "batch" is judged after the best
    split: see `batch`. Where groups are kept inside nodes, they are packed into nodes as for even shares; then each
    node's slots are planned for the rule, whose tokens still come from all ranks.

    Args:
        load: float64 (L, E), or windows (T, L, E).
        rule: "rank" or "batch".
        shape, previous, max_copies, seed: as in `plan`. `previous` keeps its groups inside nodes where `shape` does.
    """
    if previous is not None:
        return _from_previous(load, shape, rule, previous, max_copies, seed)
    members = None
    num_nodes = shape.num_nodes if shape.is_hierarchical else 1
    if shape.is_hierarchical:
        members = pack_groups(load, shape, seed)
        load = take_nodes(load, members)
    order = _by_load(load)
    load = _take(load, order)
    index = None
    if rule == "rank":
        slots, index = plan_rank_rule(load, shape.num_ranks // num_nodes, shape.num_slots // num_nodes, shape.num_ranks)
        index = index.reshape(-1, shape.num_slots)
    else:
        slots = plan_batch(load, shape.num_ranks // num_nodes, shape.num_slots // num_nodes, seed)
    slots = np.take_along_axis(order, slots, axis=1).astype(np.int32)
    if members is not None:
        slots = put_nodes(slots, members)
    return Placement(slots, shape.num_ranks, num_experts=shape.num_experts, replica_index=index)


def _from_previous(
    load: FloatArray, shape: Shape, rule: str, previous: Placement, max_copies: int | None, seed: int
) -> Placement:
    num_nodes = shape.num_nodes if shape.is_hierarchical else 1
    order = _by_load(load)
    load = _take(load, order)
    start = Placement(
        np.take_along_axis(np.argsort(order, axis=1), previous.slot_to_expert, axis=1),
        previous.num_ranks,
        num_experts=previous.num_experts,
        replica_index=previous.replica_index,
    )
    index = None
    if rule == "rank":
        slots, index = improve_rank_rule(load, start, max_copies, num_nodes)
    else:
        slots = improve_batch(load, start, max_copies, seed, num_nodes)
    found = Placement(slots, previous.num_ranks, num_experts=previous.num_experts, replica_index=index)
    # A new plan moves nine experts of ten, so below a quarter of the slots it is not worth the time.
    if num_nodes == 1 and (max_copies is None or 4 * max_copies >= shape.num_slots):
        found = _or_anew(load, shape, rule, start, found, max_copies, seed)
    placement = Placement(
        np.take_along_axis(order, found.slot_to_expert, axis=1),
        previous.num_ranks,
        num_experts=previous.num_experts,
        replica_index=found.replica_index,
    )
    return _in_the_slots_of(previous, placement)


def _or_anew(
    load: FloatArray, shape: Shape, rule: str, start: Placement, found: Placement, max_copies: int | None, seed: int
) -> Placement:
    """`found`, but a new plan for the layers in which that is better, its copies are allowed and, if free, they pay."""
    judge, price = (_judge_rank_rule, rank_rule.PRICE_OF_COPY) if rule == "rank" else (judge_batch, batch.PRICE_OF_COPY)
    price = price if max_copies is None else 0.0
    reached = judge(load, found, seed)
    behind = np.flatnonzero(reached > 1 + price * shape.num_slots / 4)
    if not behind.size:
        return found
    part = load[..., behind, :]
    in_use, walked = layers_of(start, behind), layers_of(found, behind)
    new = rename_ranks(plan_for_rule(part, shape, rule, seed=seed), in_use)
    copies = count_copies(in_use, new)
    gain = reached[behind] - judge(part, new, seed) - price * (copies - count_copies(in_use, walked))
    better = (gain > 0) & (copies <= (shape.num_slots if max_copies is None else max_copies))
    slots, index = found.slot_to_expert.copy(), found.replica_index.copy()
    slots[behind[better]], index[behind[better]] = new.slot_to_expert[better], new.replica_index[better]
    return Placement(slots, found.num_ranks, num_experts=found.num_experts, replica_index=index)


def _judge_rank_rule(load: FloatArray, placement: Placement, _: int) -> FloatArray:
    """(L,): the mean peak-to-average load of the windows."""
    peaks = peak_over_mean(RULES.get("rank").rank_loads(load, placement))
    return peaks.mean(axis=0) if load.ndim == 3 else peaks


def _by_load(load: FloatArray) -> npt.NDArray[np.int64]:
    """int64 (L, E): experts in descending order of mean load, so that no plan depends on what they are called."""
    return np.argsort(-(load.mean(axis=0) if load.ndim == 3 else load), axis=1, kind="stable")


def _take(load: FloatArray, order: npt.NDArray[np.int64]) -> FloatArray:
    return np.take_along_axis(load, np.broadcast_to(order, load.shape), axis=-1)


def _in_the_slots_of(previous: Placement, placement: Placement) -> Placement:
    """The same placement with every expert that stays on its rank in the slot where it was."""
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
