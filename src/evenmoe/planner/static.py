"""Plans for one load vector per layer, counts and packing together: evenmoe's own, and the published greedy one.

`plan_greedy` is what deepseek-ai/EPLB does, and vLLM, SGLang and TensorRT-LLM after it, written from its description,
to compare with. Global: every spare slot goes to the expert with the largest load per replica, then the replicas,
heaviest first, each go to the lightest rank with a free slot. Hierarchical: groups of experts are packed onto nodes the
same way, and every node replicates and packs on its own with an equal share of the slots. Nothing keeps two replicas of
an expert off one rank, and nothing looks at the placement in use.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, as_load, within_range
from evenmoe.placement import IntArray, Placement
from evenmoe.planner.kernels.bound import lower_bounds, search_exhaustively
from evenmoe.planner.kernels.packing import pack_evenly, pack_layers, replicate
from evenmoe.planner.kernels.swaps import even_layers, refine
from evenmoe.planner.options import check_shape
from evenmoe.planner.slots import named, random_state

# The quick search stops this near the bound: 0.03 % of a rank's time, at two thirds of the time of 0.01 %.
NEAR = 3e-4
# Beyond this, a layer is worth a longer search: of DeepSeek-V3's shape on Zipf loads no layer is.
FAR = 5e-4
# Two sums of the same tokens in different order differ by less; nearer than this is the same.
EXACT = 1e-9
# Replicas changed in a longer search, over the slots: 50 to 400 tries, 1-4 ms a layer on every shape measured.
EFFORT = 20_000
# Slots up to which the exhaustive search proves an optimum in 3 million nodes, 0.1 s (16 experts on 8 ranks of 3
# slots need 1.4 million at most in 96 layers), and up to which a tenth of that still often finds a better plan.
PROVABLE, SMALL = 24, 32


def plan_static(load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0) -> IntArray:
    """The slots of a placement for one load per layer, every replica taking an even share.

    Args:
        load: tokens float64 (L, E).
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        seed: of the longer search that difficult layers get, 0 or more.

    Returns:
        int32 (L, S), the expert of each slot. Each layer depends on its own load and the seed alone.

    >>> plan_static(np.array([[6.0, 1.0, 1.0]]), num_ranks=2, num_slots=4).tolist()
    [[0, 1, 0, 2]]
    """
    slots, _ = plan_peaks(load, num_ranks, num_slots, seed)
    return slots


def plan_peaks(
    load: FloatArray,
    num_ranks: int,
    num_slots: int,
    seed: int,
    enough: FloatArray | None = None,
    exhaust: bool = True,
) -> tuple[IntArray, FloatArray]:
    """As `plan_static`, and the tokens of each layer's busiest rank, float64 (L,).

    `enough` (L,) are tokens below which a busiest rank need not be pressed. Without `exhaust` small layers are searched
    no further than large ones: a millisecond a layer, not ten.
    """
    num_layers, num_experts = load.shape
    width = num_slots // num_ranks
    mean = load.sum(axis=1) / num_ranks
    if width >= num_experts:
        # Every rank holds every expert equally often, so all ranks are equal.
        row = np.arange(num_slots, dtype=np.int32) % width % num_experts
        return np.tile(row, (num_layers, 1)), mean
    order = np.argsort(-load, axis=1)
    slots = np.empty((num_layers, num_ranks, width), np.int64)
    pack_layers(np.ascontiguousarray(load), order, slots)
    loads = np.take_along_axis(load, order, axis=1)
    peaks = np.empty(num_layers)
    even_layers(loads, NEAR, slots, peaks)
    wanted = mean if enough is None else np.maximum(mean, enough)
    far = EXACT if num_slots <= PROVABLE else FAR
    for layer in np.flatnonzero(peaks > wanted * (1 + far)):
        peaks[layer] = _search_on(
            loads[layer], slots[layer], float(peaks[layer]), float(wanted[layer]), far, seed, exhaust
        )
    return named(slots.reshape(num_layers, num_slots), order), peaks


def _search_on(
    loads: FloatArray, slots: npt.NDArray[np.int64], peak: float, wanted: float, far: float, seed: int, exhaust: bool
) -> float:
    """Improve `slots` (G, width) of one difficult layer in place; return the tokens of its busiest rank."""
    num_ranks, width = slots.shape
    floor = np.array([peak / (1 + far)])
    lower_bounds(loads[None], num_ranks, width, floor)
    if floor[0] >= peak / (1 + far):
        return peak
    tries = 20 if exhaust and slots.size <= PROVABLE else min(max(EFFORT // slots.size, 50), 400)
    goal = max(floor[0], wanted) * (1 + NEAR)
    peak = float(refine(loads, goal, tries, random_state(seed, 1), slots))
    if exhaust and slots.size <= SMALL and peak > wanted * (1 + far):
        nodes = 3_000_000 if slots.size <= PROVABLE else 300_000
        peak = float(search_exhaustively(loads, floor[0], peak, nodes, slots)[0])
    return peak


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
    shape = check_shape(tokens.shape[1], num_ranks, num_slots, num_nodes, num_groups)
    size = shape.num_experts // shape.num_groups
    slots = np.empty((len(tokens), shape.num_nodes, shape.node_slots), np.int32)
    for layer, row in enumerate(tokens):
        groups = pack_evenly(row.reshape(-1, size).sum(axis=1), shape.num_nodes)
        for node, members in enumerate(np.sort(groups, axis=1)):
            experts = (members[:, None] * size + np.arange(size)).ravel()
            owner, counts = replicate(row[experts], shape.node_slots, shape.node_slots)
            packed = pack_evenly(row[experts][owner] / counts[owner], shape.node_ranks)
            slots[layer, node] = experts[owner[packed]].ravel()
    return Placement(slots.reshape(len(tokens), -1), shape.num_ranks, num_experts=shape.num_experts)
