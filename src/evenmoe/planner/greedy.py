"""The published greedy planner (deepseek-ai/EPLB, and vLLM, SGLang and TensorRT-LLM after it), to compare with.

Written from its description. Global: every spare slot goes to the expert with the largest load per replica, then the
replicas, heaviest first, each go to the lightest rank with a free slot. Hierarchical: groups of experts are packed onto
nodes the same way, and every node replicates and packs on its own with an equal share of the slots. Nothing keeps two
replicas of an expert off one rank, and nothing looks at the placement in use.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled
from evenmoe.metrics import as_load, within_range
from evenmoe.placement import Placement
from evenmoe.planner.options import check_shape


def plan_greedy(
    load: npt.ArrayLike, *, num_ranks: int, num_slots: int, num_nodes: int = 1, num_groups: int = 1
) -> Placement:
    """Plan as the published greedy planner does; called as `evenmoe.plan` is.

    Args:
        load: tokens per logical expert, (L, E), or windows (T, L, E), which are added up.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        num_nodes: nodes that share the ranks evenly, in rank order.
        num_groups: with more than one of both, groups stay inside nodes as in `evenmoe.plan`.

    Returns:
        The placement. Equal loads are taken in ascending order of id.

    Raises:
        ConstraintError: counts that cannot work; the text names the nearest that do.

    >>> plan_greedy([[6, 1, 1]], num_ranks=2, num_slots=4).slot_to_expert.tolist()
    [[0, 1, 0, 2]]
    >>> shape = {"num_ranks": 2, "num_slots": 4, "num_nodes": 2, "num_groups": 4}
    >>> plan_greedy([[6, 4, 3, 1]], **shape).slot_to_expert.tolist()
    [[0, 3, 1, 2]]
    """
    tokens = within_range(as_load(load))
    tokens = tokens.sum(axis=0) if tokens.ndim == 3 else tokens
    num_layers, num_experts = tokens.shape
    shape = check_shape(num_experts, num_ranks, num_slots, num_nodes, num_groups)
    if not shape.is_hierarchical:
        num_nodes = num_groups = 1
    size = num_experts // num_groups
    slots = np.empty((num_layers, num_slots), np.int32)
    for layer in range(num_layers):
        groups = pack(tokens[layer].reshape(num_groups, size).sum(axis=1), num_nodes)
        for node, members in enumerate(np.sort(groups, axis=1)):
            experts = (members[:, None] * size + np.arange(size)).ravel()
            owner, share = replicate(tokens[layer, experts], num_slots // num_nodes)
            packed = pack(share, num_ranks // num_nodes)
            slots[layer].reshape(num_nodes, -1)[node] = experts[owner[packed]].ravel()
    return Placement(slots, num_ranks, num_experts=num_experts)


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
