"""Plans for the loads that a replica rule really produces, which need not be an even share for every replica."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.planner._shape import Shape
from evenmoe.planner.batch import improve_batch, plan_batch
from evenmoe.planner.hierarchical import pack_groups, put_nodes, take_nodes
from evenmoe.planner.rank_rule import improve_rank_rule, plan_rank_rule


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
    placement = Placement(
        np.take_along_axis(order, slots, axis=1),
        previous.num_ranks,
        num_experts=previous.num_experts,
        replica_index=index,
    )
    return _in_the_slots_of(previous, placement)


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
