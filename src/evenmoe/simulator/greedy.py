"""The published greedy planner (deepseek-ai/EPLB, and vLLM, SGLang and TensorRT-LLM after it), to compare with.

Written from its description. Global: every spare slot goes to the expert with the largest load per replica, then the
replicas, heaviest first, each go to the lightest rank with a free slot. Hierarchical: groups of experts are packed onto
nodes the same way, and every node replicates and packs on its own with an equal share of the slots. Nothing keeps two
replicas of an expert off one rank, and nothing looks at the placement in use.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled
from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray


def plan_greedy(load: FloatArray, num_ranks: int, num_slots: int, num_nodes: int = 1, num_groups: int = 1) -> IntArray:
    """The slots, int32 (L, S), for tokens per expert `load` float64 (L, E).

    Args:
        load: tokens per logical expert.
        num_ranks: G, a multiple of the nodes.
        num_slots: S, a multiple of the ranks and at least E.
        num_nodes, num_groups: with more than one of both, the hierarchical plan; groups are runs of E / groups experts
            and a multiple of the nodes.

    Equal loads are taken in ascending order of id.

    >>> plan_greedy(np.array([[6.0, 1.0, 1.0]]), num_ranks=2, num_slots=4).tolist()
    [[0, 1, 0, 2]]
    >>> plan_greedy(np.array([[6.0, 4.0, 3.0, 1.0]]), 2, 4, num_nodes=2, num_groups=4).tolist()
    [[0, 3, 1, 2]]
    """
    num_layers, num_experts = load.shape
    slots = np.empty((num_layers, num_slots), np.int32)
    if num_nodes == 1 or num_groups == 1:
        num_nodes = num_groups = 1
    size = num_experts // num_groups
    for layer in range(num_layers):
        groups = pack(load[layer].reshape(num_groups, size).sum(axis=1), num_nodes)
        for node, members in enumerate(np.sort(groups, axis=1)):
            experts = (members[:, None] * size + np.arange(size)).ravel()
            owner, share = replicate(load[layer, experts], num_slots // num_nodes)
            packed = pack(share, num_ranks // num_nodes)
            slots[layer].reshape(num_nodes, -1)[node] = experts[owner[packed]].ravel()
    return slots


@compiled
def replicate(load, num_slots):
    """The expert of each replica, int64 (S,), and the load of each replica, float64 (S,); the first E are 0…E−1."""
    num_experts = load.size
    counts = np.ones(num_experts, np.int64)
    owner = np.empty(num_slots, np.int64)
    for slot in range(num_slots):
        if slot < num_experts:
            owner[slot] = slot
            continue
        best = 0
        for expert in range(1, num_experts):
            if load[expert] / counts[expert] > load[best] / counts[best]:
                best = expert
        owner[slot] = best
        counts[best] += 1
    return owner, load[owner] / counts[owner]


@compiled
def pack(weights, num_bins):
    """Which items each bin gets, int64 (bins, items / bins): heaviest first, to the lightest bin that has room."""
    width = weights.size // num_bins
    held = np.empty((num_bins, width), np.int64)
    used = np.zeros(num_bins, np.int64)
    total = np.zeros(num_bins)
    for item in np.argsort(-weights, kind="mergesort"):
        best = -1
        for place in range(num_bins):
            if used[place] < width and (best < 0 or total[place] < total[best]):
                best = place
        held[best, used[best]] = item
        used[best] += 1
        total[best] += weights[item]
    return held
