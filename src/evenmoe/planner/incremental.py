"""The incremental plan: from the placement in use to a better one, by few copies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, count_arrivals
from evenmoe.planner.hierarchical import plan_hierarchical
from evenmoe.planner.kernels.packing import keep_slots
from evenmoe.planner.kernels.walk import walk_layers
from evenmoe.planner.options import Shape
from evenmoe.planner.slots import Indices, Integers, Padding, Slots, by_load, even_par, lay_over, positions, take
from evenmoe.planner.static import plan_peaks
from evenmoe.slot_arrays import IntArray, held_by_rank

# Load over which a rank counts as too busy, in mean rank loads. A little below the mean, so that a swap evens out both
# of its ranks at once; 0.995 takes 0.3 copies a layer less than 0.99 and 0.05 less than 1.0 (DeepSeek-V3's shape).
THRESHOLD = 0.995
# Where neither a budget nor a target is given: how near to the mean, or to what a new plan reaches, is near enough.
NEAR_MEAN, NEAR_NEW = 1.01, 1.005


def plan_incremental(
    load: FloatArray,
    used: Integers,
    shape: Shape,
    max_copies: int | None = None,
    target_par: float | None = None,
    seed: int = 0,
    sizes: tuple[int, ...] | None = None,
    before: npt.NDArray[np.bool_] | None = None,
) -> IntArray:
    """Improve the placement in use within a budget of copies, or to a target by few.

    Experts that stay on their rank keep their slot. A copy is an expert on a rank that did not hold it before.

    Args:
        load: tokens float64 (L, E), or windows (T, L, E): then their mean peak-to-average load counts.
        used: integers (L, S), the expert that each slot holds now.
        shape: with more than one node every group stays inside one, as it does in `used`; only a new plan, where the
            budget allows it, moves groups to other nodes.
        max_copies: at most so many copies in any layer. None for no bound. A larger budget never gives a worse layer.
        target_par: peak-to-average load at which a layer is good enough. None to use the budget up; with neither, the
            larger of 1.01 and what a new plan reaches plus 0.5 %.
        seed: of the new plan that a large budget is compared with.
        sizes: slots of each rank, 1 to E, where these differ; then the shape's slots are their sum.
        before: bool (L, G, E), what ranks held, where it is not what `used` holds; then `used` is a start whose copies
            from there count, too.

    Returns:
        int32 (L, S), the expert of each slot.

    Rank 0 carries 8 of 10 tokens; exchanging experts 0 and 2 leaves 5 and 5, by two copies:

    >>> load, used = np.array([[4.0, 4.0, 1.0, 1.0]]), np.array([[0, 1, 2, 3]])
    >>> plan_incremental(load, used, Shape(4, 2, 4, 1, 1), max_copies=2)
    array([[2, 1, 0, 3]], dtype=int32)
    """
    padding = Padding(sizes or (shape.num_slots // shape.num_ranks,) * shape.num_ranks, shape.num_experts)
    bare = windows = load if load.ndim == 3 else load[None]
    windows, used = padding.load(windows), padding.slots(used)
    before = None if before is None else padding.held(before)
    mean, num_layers = bare.mean(axis=0), len(used)
    budget = shape.num_slots if max_copies is None else max_copies

    def plan_anew(layers: Indices) -> IntArray:
        if shape.is_hierarchical:
            return plan_hierarchical(mean[layers], shape, seed)
        slots = plan_peaks(mean[layers], shape.num_ranks, shape.num_slots, seed, exhaust=False, sizes=sizes)[0]
        return padding.slots(slots).astype(np.int32)

    new, target = None, np.full(num_layers, target_par or 0.0)
    if target_par is None and max_copies is None:
        new = plan_anew(np.arange(num_layers))
        target = np.maximum(NEAR_MEAN, NEAR_NEW * even_par(windows, new, shape.num_ranks).mean(axis=0))
    slots, peaks = _walk(windows, used, shape, target, budget, before)
    behind = np.flatnonzero(peaks > target)
    # A new plan moves nine experts of ten, so below a quarter of the slots it is not worth the time.
    if behind.size and 4 * budget >= shape.num_slots:
        anew = plan_anew(behind) if new is None else new[behind]
        anew = lay_over(Slots(anew), used[behind], shape.num_ranks, shape.num_nodes, sizes).experts
        par = even_par(windows[:, behind], anew, shape.num_ranks).mean(axis=0)
        held = held_by_rank(used[behind], shape.num_ranks, windows.shape[-1]) if before is None else before[behind]
        copies = count_arrivals(held, anew)
        better = (copies <= budget) & (par < peaks[behind])
        slots[behind[better]] = anew[better]
    ordered = used.astype(np.int64)
    keep_slots(slots, shape.num_ranks, ordered)
    return padding.strip(ordered).astype(np.int32)


def _walk(
    windows: FloatArray,
    used: Integers,
    shape: Shape,
    target: FloatArray,
    budget: int,
    before: npt.NDArray[np.bool_] | None,
) -> tuple[Indices, FloatArray]:
    """Slots int64 (L, S) after a walk of few copies, and their mean peaks (L,), in mean rank loads."""
    order = by_load(windows)  # so that ties do not depend on names
    weights = np.ascontiguousarray(take(_by_mean_rank(windows, shape.num_ranks), order).transpose(1, 0, 2))
    slots = positions(used, order)
    threshold = THRESHOLD * _busiest_node(weights, slots, shape)
    peaks = np.empty(len(slots))
    held = np.zeros((0, 0, 0), bool)
    if before is not None:
        held = np.take_along_axis(before, order[:, None, :], axis=2)
    movable = shape.num_experts  # what pads the slots comes last in the order, since it has no load and the highest ids
    walk_layers(weights, shape.num_ranks, shape.node_ranks, target, threshold, budget, held, movable, slots, peaks)
    return np.take_along_axis(order, slots, axis=1), peaks


def _by_mean_rank(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Loads in mean rank loads of their window and layer; a layer without load stays zero."""
    mean = windows.sum(axis=-1, keepdims=True) / num_ranks
    return np.divide(windows, mean, out=np.zeros_like(windows), where=mean > 0)


def _busiest_node(weights: FloatArray, slots: Indices, shape: Shape) -> FloatArray:
    """(L, T): the mean rank load of the busiest node, in mean rank loads: no peak inside the nodes can be lower."""
    busiest = np.ones(weights.shape[:2])
    if shape.is_hierarchical:
        for layer, held in enumerate(slots.reshape(len(slots), shape.num_nodes, -1)):
            node_load = np.stack([weights[layer][:, np.unique(node)].sum(axis=1) for node in held])
            busiest[layer] = node_load.max(axis=0) * shape.num_nodes / shape.num_ranks
    return busiest
