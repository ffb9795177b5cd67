"""The incremental plan: from the placement in use to a better one, by few copies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, count_copies, peak_to_average
from evenmoe.placement import IntArray, Placement
from evenmoe.planner import _moves, _places
from evenmoe.planner._renaming import rename_ranks
from evenmoe.planner.hierarchical import plan_hierarchical
from evenmoe.planner.static import plan_peaks

# Load over which a rank counts as too busy, in mean rank loads. A little below the mean, so that a swap evens out both
# of its ranks at once; 0.995 takes 0.3 copies a layer less than 0.99 and 0.05 less than 1.0 (DeepSeek-V3's shape).
LEVEL = 0.995
# Where neither a budget nor a target is given: how near to the mean, or to what a new plan reaches, is near enough.
NEAR_MEAN, NEAR_NEW = 1.01, 1.005


def plan_incremental(
    load: FloatArray,
    previous: Placement,
    max_copies: int | None = None,
    target_par: float | None = None,
    seed: int = 0,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> IntArray:
    """Improve the placement in use within a budget of copies, or to a target by few.

    Experts that stay on their rank keep their slot. A copy is an expert on a rank that did not hold it before
    (`count_copies`).

    Args:
        load: tokens float64 (L, E), or windows (T, L, E): then their mean peak-to-average load counts.
        previous: the placement in use.
        max_copies: at most so many copies in any layer. None for no bound. A larger budget never gives a worse layer.
        target_par: peak-to-average load at which a layer is good enough. None to use the budget up; with neither, the
            larger of 1.01 and what a new plan reaches plus 0.5 %.
        seed: of the new plan that a large budget is compared with.
        num_nodes, num_groups: with more than one node every group stays inside one, as it does in `previous`; only a
            new plan, where the budget allows it, moves groups to other nodes.

    Returns:
        int32 (L, S), the expert of each slot.

    Rank 0 carries 8 of 10 tokens; exchanging experts 0 and 2 leaves 5 and 5, by two copies:

    >>> plan_incremental(np.array([[4.0, 4.0, 1.0, 1.0]]), Placement([[0, 1, 2, 3]], num_ranks=2), max_copies=2)
    array([[2, 1, 0, 3]], dtype=int32)
    """
    windows = load if load.ndim == 3 else load[None]
    mean, num_ranks = windows.mean(axis=0), previous.num_ranks
    budget = previous.num_slots if max_copies is None else max_copies

    def plan_anew(layers: npt.NDArray[np.int64]) -> IntArray:
        if num_nodes > 1:
            return plan_hierarchical(mean[layers], num_ranks, previous.num_slots, num_nodes, num_groups, seed)
        return plan_peaks(mean[layers], num_ranks, previous.num_slots, seed, exhaust=False)[0]

    new, target = None, np.full(previous.num_layers, target_par or 0.0)
    if target_par is None and max_copies is None:
        new = plan_anew(np.arange(previous.num_layers))
        reached = peak_to_average(windows, Placement(new, num_ranks, num_experts=previous.num_experts))
        target = np.maximum(NEAR_MEAN, NEAR_NEW * reached.mean(axis=0))
    slots, peaks = _walk(windows, previous, target, budget, num_nodes)
    behind = np.flatnonzero(peaks > target)
    # A new plan moves nine experts of ten, so below a quarter of the slots it is not worth the time.
    if behind.size and 4 * budget >= previous.num_slots:
        _take_better(
            plan_anew(behind) if new is None else new[behind],
            windows[:, behind],
            Placement(previous.slot_to_expert[behind], num_ranks, num_experts=previous.num_experts),
            num_nodes,
            budget,
            behind,
            peaks,
            slots,
        )
    ordered = previous.slot_to_expert.astype(np.int64)
    _places.keep_places(slots, num_ranks, ordered)
    return ordered.astype(np.int32)


def _walk(
    windows: FloatArray, previous: Placement, target: FloatArray, budget: int, num_nodes: int
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Slots int64 (L, S) after a walk of few copies, and their mean peaks (L,), in mean rank loads."""
    order = np.argsort(-windows.mean(axis=0), axis=1, kind="stable")  # so that ties do not depend on names
    by_load = np.take_along_axis(_by_mean_rank(windows, previous.num_ranks), order[None], axis=2)
    weights = np.ascontiguousarray(by_load.transpose(1, 0, 2))
    slots = np.take_along_axis(np.argsort(order, axis=1), previous.slot_to_expert, axis=1)
    level = LEVEL * _busiest_node(weights, slots, previous.num_ranks, num_nodes)
    peaks = np.empty(len(slots))
    node_ranks = previous.num_ranks // num_nodes
    _moves.walk_layers(weights, previous.num_ranks, node_ranks, target, level, budget, slots, peaks)
    return np.take_along_axis(order, slots, axis=1), peaks


def _by_mean_rank(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Loads in mean rank loads of their window and layer; a layer without load stays zero."""
    mean = windows.sum(axis=-1, keepdims=True) / num_ranks
    return np.divide(windows, mean, out=np.zeros_like(windows), where=mean > 0)


def _busiest_node(weights: FloatArray, slots: npt.NDArray[np.int64], num_ranks: int, num_nodes: int) -> FloatArray:
    """(L, T): the mean rank load of the busiest node, in mean rank loads: no peak inside the nodes can be lower."""
    level = np.ones(weights.shape[:2])
    if num_nodes > 1:
        for layer, held in enumerate(slots.reshape(len(slots), num_nodes, -1)):
            node_load = np.stack([weights[layer][:, np.unique(node)].sum(axis=1) for node in held])
            level[layer] = node_load.max(axis=0) * num_nodes / num_ranks
    return level


def _take_better(
    new: IntArray,
    windows: FloatArray,
    previous: Placement,
    num_nodes: int,
    budget: int,
    layers: npt.NDArray[np.int64],
    peaks: FloatArray,
    slots: npt.NDArray[np.int64],
) -> None:
    """Take a new plan of `layers` where it is within the budget and better than what the walk found."""
    renamed = rename_ranks(Placement(new, previous.num_ranks, num_experts=previous.num_experts), previous, num_nodes)
    par = peak_to_average(windows, renamed).mean(axis=0)
    better = (count_copies(previous, renamed) <= budget) & (par < peaks[layers])
    slots[layers[better]] = renamed.slot_to_expert[better]
