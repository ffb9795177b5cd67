"""Plans of one load per layer: replica counts and packing together, every replica taking an even share.

The load planned from is a sum of what was seen, and what comes differs from it. A plan that is perfect for the sum
takes replicas from experts that are hot, and is worse than a greedy one on windows that it has not seen; so replicas go
to experts by what they may come to carry, and among plans whose busiest ranks are nearly equal the one wins whose ranks
have the least to fear. In units of the mean expert the standard deviation of an expert's load u from window to window
goes as √u (the median of 18 recordings), so a cold expert's is the larger part of its load.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.planner.kernels.bound import lower_bounds, search_exhaustively
from evenmoe.planner.kernels.packing import pack_layers
from evenmoe.planner.kernels.refine import refine, restart
from evenmoe.planner.kernels.swaps import even_layers
from evenmoe.planner.slots import Padding, named, random_state
from evenmoe.slot_arrays import IntArray

# The quick search stops this near the bound: 0.03 % of a rank's time, at two thirds of the time of 0.01 %.
NEAR = 3e-4
# Beyond this, a layer is worth a longer search: of DeepSeek-V3's shape on Zipf loads no layer is.
FAR = 5e-4
# Two sums of the same tokens in different order differ by less; nearer than this is the same.
EXACT = 1e-9
# Replicas changed in a longer search, over the slots: 50 to 400 tries, 1-4 ms a layer on every shape measured.
LONGER_SEARCH = 20_000
# Slots up to which the exhaustive search proves an optimum in 3 million nodes, 0.1 s (16 experts on 8 ranks of 3
# slots need 1.4 million at most in 96 layers), and up to which a tenth of that still often finds a better plan. Optimal
# plans of recorded loads are about 1 % worse on unseen windows of Mixtral than greedy ones; they stay, since whoever
# plans so small a model for one load can know the least peak that it has.
PROVABLE, SMALL = 24, 32

# Replicas are given out by u + CAUTION √u. 2 and 4 do as well on unseen windows; 0 (D'Hondt) gives the hottest too
# many.
CAUTION = 4.0
# A longer search leaves an expert as many replicas as keep (u + CAUTION √u) / replicas within KEEPS of the largest such
# share of its start. Without that, it takes them from hot experts: +1.5 % on unseen windows, six cells of 57 worse.
KEEPS = 1.1
# What an excess over the goal weighs beside the soft peak, in mean rank loads: 30 to 100 differ by 0.1 % on unseen
# windows; 10 leaves plans of 40 slots 0.2 % over the bound of their own load.
WEIGHT = 30.0
# A start that swaps alone leave this far above the goal is replaced by the best of several others.
ROUGH = 0.02
STARTS = 10
# An expert with more than this share of all tokens, and more than HOT_LOAD mean experts, decides the layer. No
# recording at hand has one; Zipf loads have, of exponent 1 up to 256 experts, steeper ones of any number. What
# matters is how many ranks it fills, so the peak alone counts, and many starts are what finds it, in as many rounds
# as it takes to come within HOT_ROUGH: on Zipf 1.8, 20 starts leave the worst layer 5.9 % over the bound, 60 leave it
# 1.7 %.
HOT_SHARE, HOT_LOAD = 0.15, 5.0
HOT_STARTS, HOT_ROUNDS, HOT_ROUGH = 60, 3, 0.015


def plan_static(
    load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0, sizes: tuple[int, ...] | None = None
) -> IntArray:
    """The slots of a placement for one load per layer, every replica taking an even share.

    Args:
        load: tokens float64 (L, E).
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        seed: of the longer search that difficult layers get, 0 or more.
        sizes: slots of each rank, 1 to E, where these differ; then S is their sum.

    Returns:
        int32 (L, S), the expert of each slot. Each layer depends on its own load and the seed alone.

    >>> plan_static(np.array([[6.0, 1.0, 1.0]]), num_ranks=2, num_slots=4).tolist()
    [[0, 1, 0, 2]]
    """
    slots, _ = plan_peaks(load, num_ranks, num_slots, seed, sizes=sizes)
    return slots


def plan_peaks(
    load: FloatArray,
    num_ranks: int,
    num_slots: int,
    seed: int,
    enough: FloatArray | None = None,
    exhaust: bool = True,
    sizes: tuple[int, ...] | None = None,
    caution: float = CAUTION,
) -> tuple[IntArray, FloatArray]:
    """As `plan_static`, and the tokens of each layer's busiest rank, float64 (L,).

    `enough` (L,) are tokens below which a busiest rank need not be pressed. Without `exhaust` small layers are searched
    no further than large ones: a millisecond a layer, not ten. `caution` is 0 where `load` is what experts may come to
    carry already.
    """
    num_layers, num_experts = load.shape
    padding = Padding(sizes or (num_slots // num_ranks,) * num_ranks, num_experts)
    width, room = padding.width, np.array(padding.rank_sizes)
    mean = load.sum(axis=1) / num_ranks
    if min(padding.rank_sizes) >= num_experts:
        # Every rank holds every expert equally often, so all ranks are equal.
        row = np.arange(num_slots, dtype=np.int32) % width % num_experts
        return np.tile(row, (num_layers, 1)), mean
    order = np.argsort(-load, axis=1)
    slots = np.empty((num_layers, num_ranks, width), np.int64)
    if padding.num_slots <= SMALL:
        caution = 0.0  # such layers are planned for the least peak of their own load
    exhaust &= not padding.num_fixed and num_slots <= SMALL  # what pads the slots must not move
    pack_layers(np.ascontiguousarray(load), order, room, caution, slots)
    loads = padding.load(np.take_along_axis(load, order, axis=1))
    if padding.num_fixed:
        slots[:, np.arange(width) >= room[:, None]] = num_experts + np.arange(padding.num_fixed)
    peaks = np.empty(num_layers)
    even_layers(loads, NEAR, num_experts, slots, peaks)
    wanted = mean if enough is None else np.maximum(mean, enough)
    far = EXACT if num_slots <= PROVABLE else FAR
    for layer in np.flatnonzero(peaks > wanted * (1 + far)):
        floor = np.array([peaks[layer] / (1 + far)])
        lower_bounds(loads[None, layer], num_ranks, width, floor)
        if floor[0] < peaks[layer] / (1 + far):
            goal = max(float(floor[0]), float(wanted[layer])) * (1 + NEAR)
            random = random_state(seed, 1)
            if exhaust:
                peaks[layer] = _search_small(loads[layer], slots[layer], float(floor[0]), goal, far, random)
            else:
                peaks[layer] = _search_on(loads[layer], slots[layer], float(peaks[layer]), goal, random, room)
    return named(padding.strip(slots.reshape(num_layers, padding.num_slots)), order), peaks


def _search_small(
    loads: FloatArray,
    slots: npt.NDArray[np.int64],
    floor: float,
    goal: float,
    far: float,
    random: npt.NDArray[np.uint64],
) -> float:
    """Improve `slots` (G, width) of one layer in place, by all placements; return the tokens of its busiest rank."""
    least = np.ones(loads.size, np.int64)
    tries, nodes = (20, 3_000_000) if slots.size <= PROVABLE else (400, 300_000)
    # Where the nodes do not suffice, what they start from counts.
    restart(loads, goal, HOT_STARTS, random, loads.size, np.full(len(slots), slots.shape[1]), 0.0, slots)
    peak = float(refine(loads, goal, tries, random, loads.size, least, 0.0, slots))
    if peak > goal / (1 + NEAR) * (1 + far):
        peak = float(search_exhaustively(loads, floor, peak, nodes, slots)[0])
    return peak


def _search_on(
    loads: FloatArray,
    slots: npt.NDArray[np.int64],
    peak: float,
    goal: float,
    random: npt.NDArray[np.uint64],
    room: npt.NDArray[np.int64],
) -> float:
    """Improve `slots` (G, width) of one difficult layer in place; return the tokens of its busiest rank.

    The ranks have `room` (G,) slots for experts that move; what is in the others stays.
    """
    movable = loads.size - int(slots.size - room.sum())
    tries = min(max(LONGER_SEARCH // slots.size, 50), 400)
    is_hot = loads[0] > max(HOT_SHARE, HOT_LOAD / movable) * loads.sum() or slots.size <= SMALL
    weight, least = (0.0, np.ones(loads.size, np.int64)) if is_hot else (WEIGHT, None)
    starts = HOT_STARTS if is_hot and slots.shape[1] > 2 else STARTS
    first, best = slots.copy(), np.inf
    for _ in range(HOT_ROUNDS if is_hot else 1):
        trial = first.copy()
        if peak > goal * (1 + ROUGH):
            restart(loads, goal, starts, random, movable, room, weight, trial)
        keep = _least_replicas(loads, trial, movable) if least is None else least
        found = float(refine(loads, goal, tries, random, movable, keep, weight, trial))
        if found < best:
            best, slots[:] = found, trial
        if best <= goal * (1 + HOT_ROUGH):
            break
    return best


def _least_replicas(loads: FloatArray, slots: npt.NDArray[np.int64], movable: int) -> npt.NDArray[np.int64]:
    """How many replicas each expert keeps, int64 (E,), so that none comes to risk more than the riskiest does now.

    Expert 0 weighs 4 mean experts, 4 + 4 × 2 = 12 at risk, 4 per replica; one replica less would have 6:

    >>> _least_replicas(np.array([4.0, 0.0, 0.0, 0.0]), np.array([[0, 1], [0, 2], [0, 3]]), 4).tolist()
    [3, 1, 1, 1]
    """
    load = loads / (loads[:movable].mean() or 1.0)
    risk = load + CAUTION * np.sqrt(load)
    largest = (risk / np.bincount(slots.ravel(), minlength=loads.size)).max()
    return np.ceil(np.maximum(risk / (KEEPS * largest or 1.0), 1)).astype(np.int64)
