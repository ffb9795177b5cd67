"""Plans that keep each group of experts inside one node, as DeepSeek-V3's group-limited routing wants it.

Which groups share a node is decided among every way to assign them, by lazy evaluation, where these are not too many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from math import comb, factorial

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.planner.kernels.packing import pack_evenly
from evenmoe.planner.options import Shape
from evenmoe.planner.slots import Indices
from evenmoe.planner.static import plan_peaks
from evenmoe.planner.windows import plan_windows
from evenmoe.slot_arrays import IntArray

# (layers (n,), node sets (n,), tokens (n,) below which a node need not be pressed) -> tokens (n,) of the busiest rank
Evaluate = Callable[[Indices, Indices, FloatArray], FloatArray]

# 12 groups on 4 nodes are 15,400 packings; choosing among that many takes about a millisecond a layer.
MOST_PACKINGS = 20_000


def plan_hierarchical(load: FloatArray, shape: Shape, seed: int = 0) -> IntArray:
    """The slots of a placement whose groups stay inside nodes, every replica taking an even share.

    All packings of groups into nodes are compared where there are at most 20,000 (8 groups on 4 nodes are 105): the
    one is taken whose busiest rank, with the slots of every node planned, is least busy. Beyond that the groups
    are assigned heaviest first and then swapped between nodes.

    Args:
        load: tokens float64 (L, E), or windows (T, L, E): groups are then packed by the mean, and the slots of every
            node planned from the windows.
        shape: node n has the ranks from n × G / nodes, and groups are runs of E / groups experts.
        seed: of the longer search that difficult layers get, 0 or more.

    Returns:
        int32 (L, S), the expert of each slot.

    Four groups of one expert on two nodes of one rank: 6 + 1 and 4 + 3 tokens are even, 6 + 3 and 4 + 1 are not.

    >>> plan_hierarchical(np.array([[6.0, 4.0, 3.0, 1.0]]), Shape(4, 2, 4, 2, 4)).tolist()
    [[0, 3, 1, 2]]
    """
    members, inner = pack_groups(load, shape, seed)
    if load.ndim == 3:
        inner = plan_windows(take_nodes(load, members), shape.node_ranks, shape.node_slots, seed)
    elif inner is None:
        inner = plan_peaks(take_nodes(load, members), shape.node_ranks, shape.node_slots, seed)[0]
    return put_nodes(inner, members)


def pack_groups(load: FloatArray, shape: Shape, seed: int) -> tuple[Indices, IntArray | None]:
    """The experts of each node under the best packing, int64 (L, nodes, E / nodes) ascending, and perhaps its slots.

    These are int32 (L × nodes, S / nodes), of the mean load; None where there are too many packings.
    """
    num_nodes, num_groups = shape.num_nodes, shape.num_groups
    load = load.mean(axis=0) if load.ndim == 3 else load
    if count_packings(num_groups, num_nodes) > MOST_PACKINGS:
        totals = load.reshape(len(load), num_groups, -1).sum(axis=2)
        groups = np.stack([even_packing(row, num_nodes) for row in totals])
        return group_members(groups, load.shape[1] // num_groups), None
    sets, packings = all_packings(num_groups, num_nodes)
    experts = group_members(sets, load.shape[1] // num_groups)
    plans = np.zeros((len(load), len(sets), shape.node_slots), np.int32)

    def evaluate(layers: Indices, numbers: Indices, enough: FloatArray) -> FloatArray:
        node_load = load[layers[:, None], experts[numbers]]
        plans[layers, numbers], peaks = plan_peaks(node_load, shape.node_ranks, shape.node_slots, seed, enough)
        return peaks

    floors = load.reshape(len(load), num_groups, -1).sum(axis=2)[:, sets].sum(axis=2) / shape.node_ranks
    chosen = packings[best_packings(floors, packings, evaluate)]
    inner = plans[np.arange(len(load))[:, None], chosen]
    return experts[chosen], inner.reshape(-1, shape.node_slots)


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


def count_packings(num_groups: int, num_nodes: int) -> int:
    """Ways to assign groups to nodes of equal size, nodes without names.

    >>> count_packings(8, 4)
    105
    """
    each = num_groups // num_nodes
    return factorial(num_groups) // (factorial(each) ** num_nodes * factorial(num_nodes))


@lru_cache(maxsize=16)
def all_packings(num_groups: int, num_nodes: int) -> tuple[Indices, Indices]:
    """Every set of groups that can fill a node, and every packing as the numbers of its sets.

    Returns:
        int64 (C, groups per node), the groups of each set; int64 (P, nodes), the sets of each packing. Sets of a
        packing ascend in their first group.

    >>> sets, packings = all_packings(4, 2)
    >>> sets.tolist(), packings.tolist()
    ([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], [[0, 5], [1, 4], [2, 3]])
    """
    each = num_groups // num_nodes
    sets = list(combinations(range(num_groups), each))
    number = {chosen: i for i, chosen in enumerate(sets)}
    packings: list[list[int]] = []

    def fill(free: tuple[int, ...], so_far: list[int]) -> None:
        if not free:
            packings.append(so_far)
            return
        for others in combinations(free[1:], each - 1):
            chosen = (free[0], *others)
            fill(tuple(group for group in free if group not in chosen), [*so_far, number[chosen]])

    fill(tuple(range(num_groups)), [])
    assert len(sets) == comb(num_groups, each)
    return np.array(sets), np.array(packings)


def best_packings(floors: FloatArray, packings: Indices, evaluate: Evaluate) -> Indices:
    """The packing of each layer whose busiest node is least busy; ties go to the lowest sum of squares.

    Sets are evaluated only when a packing that looks best needs them, so the result is the best of all packings at
    the price of a few: until then a set counts with its floor.

    Args:
        floors: tokens (L, C) that the busiest rank of each set cannot undercut; replaced by evaluated peaks.
        packings: int64 (P, nodes), from `all_packings`.
        evaluate: gives the peaks of sets.

    Returns:
        int64 (L,), the number of the chosen packing.
    """
    num_layers = floors.shape[0]
    known = np.zeros(floors.shape, bool)
    chosen = np.zeros(num_layers, np.int64)
    open_layers = np.arange(num_layers)
    while open_layers.size:
        for layer in open_layers:
            nodes = floors[layer, packings]
            peak = nodes.max(axis=1)
            equal = np.flatnonzero(peak <= peak.min() * (1 + 1e-9))
            chosen[layer] = equal[np.argmin((nodes[equal] ** 2).sum(axis=1))]
        sets = packings[chosen[open_layers]]
        enough = np.broadcast_to(floors[open_layers[:, None], sets].max(axis=1)[:, None], sets.shape)
        missing = ~known[open_layers[:, None], sets]
        layers = np.broadcast_to(open_layers[:, None], sets.shape)[missing]
        floors[layers, sets[missing]] = evaluate(layers, sets[missing], enough[missing])
        known[layers, sets[missing]] = True
        open_layers = open_layers[missing.any(axis=1)]
    return chosen


def even_packing(totals: FloatArray, num_nodes: int) -> Indices:
    """A packing of one layer where there are too many to try all: heaviest first, then swaps between nodes.

    Args:
        totals: tokens (groups,).

    Returns:
        int64 (nodes, groups per node), groups ascending; nodes ascend in their first group.

    >>> even_packing(np.array([6.0, 5.0, 2.0, 1.0]), 2).tolist()
    [[0, 3], [1, 2]]
    """
    each = totals.size // num_nodes
    nodes: list[list[int]] = pack_evenly(totals, num_nodes).tolist()
    load = np.array([sum(totals[node], 0.0) for node in nodes])
    while True:
        busiest = int(np.argmax(load))
        peak, mine, other, theirs = min(
            (max(load[busiest] - step, load[other] + step), i, other, j)
            for other in range(num_nodes)
            for i in range(each)
            for j in range(each)
            for step in [totals[nodes[busiest][i]] - totals[nodes[other][j]]]
            if other != busiest or step == 0
        )
        if peak >= load[busiest] * (1 - 1e-12):
            return np.array(sorted(sorted(node) for node in nodes))
        step = totals[nodes[busiest][mine]] - totals[nodes[other][theirs]]
        nodes[busiest][mine], nodes[other][theirs] = nodes[other][theirs], nodes[busiest][mine]
        load[busiest] -= step
        load[other] += step
