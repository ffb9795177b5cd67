"""Plans that keep each group of experts inside one node, as DeepSeek-V3's group-limited routing wants it."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray
from evenmoe.planner._groups import (
    MOST_PACKINGS,
    Indices,
    all_packings,
    best_packings,
    count_packings,
    even_packing,
)
from evenmoe.planner.options import Shape
from evenmoe.planner.static import plan_peaks


def plan_hierarchical(
    load: FloatArray, num_ranks: int, num_slots: int, num_nodes: int, num_groups: int, seed: int = 0
) -> IntArray:
    """The slots of a placement whose groups stay inside nodes, every replica taking an even share.

    All packings of groups into nodes are compared where there are at most 20,000 (8 groups on 4 nodes are 105): the
    one is taken whose busiest rank, with the slots of every node planned, is least busy. Beyond that the groups
    are dealt out heaviest first and then swapped between nodes.

    Args:
        load: tokens float64 (L, E), or windows (T, L, E): groups are then packed by the mean, and the slots of every
            node planned from the windows.
        num_ranks: G, a multiple of the nodes; node n has the ranks from n × G / nodes.
        num_slots: S, at least E and a multiple of G.
        num_nodes: nodes.
        num_groups: groups, runs of E / groups experts; a multiple of the nodes.
        seed: of the longer search that difficult layers get, 0 or more.

    Returns:
        int32 (L, S), the expert of each slot.

    Four groups of one expert on two nodes of one rank: 6 + 1 and 4 + 3 tokens are level, 6 + 3 and 4 + 1 are not.

    >>> plan_hierarchical(np.array([[6.0, 4.0, 3.0, 1.0]]), 2, 4, 2, 4).tolist()
    [[0, 3, 1, 2]]
    """
    members, inner = _pack_groups(load, num_ranks, num_slots, num_nodes, num_groups, seed)
    if load.ndim == 3 or inner is None:
        inner = _plan_nodes(take_nodes(load, members), num_ranks // num_nodes, num_slots // num_nodes, seed)
    return put_nodes(inner, members)


def pack_groups(load: FloatArray, shape: Shape, seed: int) -> Indices:
    """The experts of every node, int64 (L, nodes, E / nodes) ascending, groups packed as in `plan_hierarchical`."""
    return _pack_groups(load, shape.num_ranks, shape.num_slots, shape.num_nodes, shape.num_groups, seed)[0]


def _plan_nodes(load: FloatArray, num_ranks: int, num_slots: int, seed: int) -> IntArray:
    if load.ndim == 3:
        from evenmoe.planner.windows import plan_windows

        return plan_windows(load, num_ranks, num_slots, seed)
    return plan_peaks(load, num_ranks, num_slots, seed)[0]


def _pack_groups(
    load: FloatArray, num_ranks: int, num_slots: int, num_nodes: int, num_groups: int, seed: int
) -> tuple[Indices, IntArray | None]:
    """The experts of each node under the best packing (L, nodes, E / nodes), and its slots (L × nodes, …) or None."""
    load = load.mean(axis=0) if load.ndim == 3 else load
    if count_packings(num_groups, num_nodes) > MOST_PACKINGS:
        totals = load.reshape(len(load), num_groups, -1).sum(axis=2)
        groups = np.stack([even_packing(row, num_nodes) for row in totals])
        return group_members(groups, load.shape[1] // num_groups), None
    sets, packings = all_packings(num_groups, num_nodes)
    experts = group_members(sets, load.shape[1] // num_groups)
    node_ranks, node_slots = num_ranks // num_nodes, num_slots // num_nodes
    plans = np.zeros((len(load), len(sets), node_slots), np.int32)

    def evaluate(layers: Indices, numbers: Indices, enough: FloatArray) -> FloatArray:
        node_load = load[layers[:, None], experts[numbers]]
        plans[layers, numbers], peaks = plan_peaks(node_load, node_ranks, node_slots, seed, enough)
        return peaks

    floors = load.reshape(len(load), num_groups, -1).sum(axis=2)[:, sets].sum(axis=2) / node_ranks
    chosen = packings[best_packings(floors, packings, evaluate)]
    inner = plans[np.arange(len(load))[:, None], chosen]
    return experts[chosen], inner.reshape(-1, node_slots)


def group_members(groups: Indices, size: int) -> Indices:
    """The experts of each row of groups, (…, groups) to (…, groups × size).

    >>> group_members(np.array([[0, 2]]), 3).tolist()
    [[0, 1, 2, 6, 7, 8]]
    """
    experts = groups[..., None] * size + np.arange(size)
    return experts.reshape(*groups.shape[:-1], -1)


def take_nodes(load: FloatArray, members: Indices) -> FloatArray:
    """Every node of every layer as a layer of its own: (…, L, E) to (…, L × nodes, E / nodes)."""
    num_layers, num_nodes, size = members.shape
    index = np.broadcast_to(members.reshape(num_layers, -1), load.shape)
    return np.take_along_axis(load, index, axis=-1).reshape(*load.shape[:-2], num_layers * num_nodes, size)


def put_nodes(slots: IntArray, members: Indices) -> IntArray:
    """The reverse for slots: (L × nodes, S / nodes) of local experts to (L, S) of the model's."""
    num_layers, num_nodes, _ = members.shape
    local = slots.reshape(num_layers, num_nodes, -1)
    return np.take_along_axis(members, local, axis=2).reshape(num_layers, -1).astype(np.int32)
