"""Which groups of experts share a node: every way of dealing them out, and the best one by lazy evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from math import comb, factorial

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray

Indices = npt.NDArray[np.int64]
# (layers (n,), node sets (n,), tokens (n,) below which a node need not be pressed) -> tokens (n,) of the busiest rank
Evaluate = Callable[[Indices, Indices, FloatArray], FloatArray]

# 12 groups on 4 nodes are 15,400 packings; choosing among that many takes about a millisecond a layer.
MOST_PACKINGS = 20_000


def count_packings(num_groups: int, num_nodes: int) -> int:
    """Ways to deal groups out to nodes of equal size, nodes without names.

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
            level = np.flatnonzero(peak <= peak.min() * (1 + 1e-9))
            chosen[layer] = level[np.argmin((nodes[level] ** 2).sum(axis=1))]
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
    nodes: list[list[int]] = [[] for _ in range(num_nodes)]
    load = np.zeros(num_nodes)
    for group in np.argsort(-totals, kind="stable").tolist():
        node = min((n for n in range(num_nodes) if len(nodes[n]) < each), key=lambda n: (load[n], n))
        nodes[node].append(group)
        load[node] += totals[group]
    while True:
        hot = int(np.argmax(load))
        peak, mine, other, theirs = min(
            (max(load[hot] - step, load[other] + step), i, other, j)
            for other in range(num_nodes)
            for i in range(each)
            for j in range(each)
            for step in [totals[nodes[hot][i]] - totals[nodes[other][j]]]
            if other != hot or step == 0
        )
        if peak >= load[hot] * (1 - 1e-12):
            return np.array(sorted(sorted(node) for node in nodes))
        step = totals[nodes[hot][mine]] - totals[nodes[other][theirs]]
        nodes[hot][mine], nodes[other][theirs] = nodes[other][theirs], nodes[hot][mine]
        load[hot] -= step
        load[other] += step
