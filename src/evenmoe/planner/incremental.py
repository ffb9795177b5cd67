"""The incremental plan: from the placement in use to a better one, by few copies."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray, count_copies, peak_to_average
from evenmoe.placement import IntArray, Placement
from evenmoe.planner import _moves
from evenmoe.planner.static import plan_static

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

    Returns:
        int32 (L, S), the expert of each slot.

    Rank 0 carries 8 of 10 tokens; exchanging experts 0 and 2 leaves 5 and 5, by two copies:

    >>> plan_incremental(np.array([[4.0, 4.0, 1.0, 1.0]]), Placement([[0, 1, 2, 3]], num_ranks=2), max_copies=2)
    array([[2, 1, 0, 3]], dtype=int32)
    """
    windows = load if load.ndim == 3 else load[None]
    num_ranks = previous.num_ranks
    budget = previous.num_slots if max_copies is None else max_copies
    target = _targets(windows, previous, max_copies, target_par, seed)
    weights = np.ascontiguousarray(_by_mean_rank(windows, num_ranks).transpose(1, 0, 2))
    slots, peaks = previous.slot_to_expert.astype(np.int64), np.empty(previous.num_layers)
    _moves.walk_layers(weights, num_ranks, target, LEVEL, budget, slots, peaks)
    behind = np.flatnonzero(peaks > target)
    # A new plan moves nine experts of ten, so below a quarter of the slots it is not worth the time.
    if behind.size and 4 * budget >= previous.num_slots:
        _try_new_plan(windows, previous, budget, seed, behind, peaks, slots)
    ordered = previous.slot_to_expert.astype(np.int64)
    _moves.keep_places(slots, num_ranks, ordered)
    return ordered.astype(np.int32)


def _targets(
    windows: FloatArray, previous: Placement, max_copies: int | None, target_par: float | None, seed: int
) -> FloatArray:
    if target_par is not None or max_copies is not None:
        return np.full(previous.num_layers, target_par or 0.0)
    new = Placement(
        plan_static(windows.mean(axis=0), previous.num_ranks, previous.num_slots, seed),
        previous.num_ranks,
        num_experts=previous.num_experts,
    )
    return np.maximum(NEAR_MEAN, NEAR_NEW * peak_to_average(windows, new).mean(axis=0))


def _by_mean_rank(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Loads in mean rank loads of their window and layer; a layer without load stays zero."""
    mean = windows.sum(axis=-1, keepdims=True) / num_ranks
    return np.divide(windows, mean, out=np.zeros_like(windows), where=mean > 0)


def _try_new_plan(
    windows: FloatArray,
    previous: Placement,
    budget: int,
    seed: int,
    layers: np.ndarray,
    peaks: FloatArray,
    slots: np.ndarray,
) -> None:
    """Take a new plan where it is within the budget and better than what the walk found."""
    num_ranks = previous.num_ranks
    new = plan_static(windows.mean(axis=0)[layers], num_ranks, previous.num_slots, seed)
    before = Placement(previous.slot_to_expert[layers], num_ranks, num_experts=previous.num_experts)
    renamed = Placement(_rename_ranks(new, before), num_ranks, num_experts=previous.num_experts)
    copies = count_copies(before, renamed)
    par = peak_to_average(windows[:, layers], renamed).mean(axis=0)
    better = (copies <= budget) & (par < peaks[layers])
    slots[layers[better]] = renamed.slot_to_expert[better]


def _rename_ranks(new: IntArray, previous: Placement) -> IntArray:
    """Ranks are alike, so each new rank is put where most of its experts are already; the best pairs first."""
    num_ranks, width = previous.num_ranks, previous.slots_per_rank
    renamed = np.empty_like(new)
    for layer in range(len(new)):
        planned = new[layer].reshape(num_ranks, width)
        held = np.zeros((num_ranks, previous.num_experts), np.int64)
        held[np.arange(num_ranks)[:, None], previous.slot_to_expert[layer].reshape(num_ranks, width)] = 1
        common = held[:, planned].sum(axis=2)  # (rank in use, new rank)
        placed = renamed[layer].reshape(num_ranks, width)
        for pair in np.argsort(-common, axis=None, kind="stable"):
            rank, taken = divmod(int(pair), num_ranks)
            if common[rank, taken] >= 0:
                placed[rank] = planned[taken]
                common[rank], common[:, taken] = -1, -1
    return renamed
