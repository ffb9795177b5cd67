"""Planning for the `rank` rule: replica counts that the rule reaches, and each replica with the share it will get."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray, peak_over_mean
from evenmoe.planner.kernels.rank_rule import count_reachable, improve, pack
from evenmoe.planner.options import Shape
from evenmoe.planner.slots import Slots, normalized
from evenmoe.rules.rank import ranks_choosing
from evenmoe.slot_arrays import count_replicas, held_by_rank

# What a copy must gain when starting from a placement in use, in mean rank loads: as for the other rules.
PRICE_OF_COPY = 5e-4
# Replica counts are tried for the loads to these powers, until a mean peak is good. With many slots the first is. Last
# the lightest are replicated: with few slots two halves of a light expert can fill up ranks best.
_POWERS = (1.0, 0.8, 1.25, 0.5, 0.0)
_GOOD = 1.005


def plan_anew(load: FloatArray, num_ranks: int, num_slots: int, world: int, seed: int) -> Slots:
    """Slots for `load` float64 (L, E) or (T, L, E).

    Rank r of the `world` takes replica r // ceil(world / count); `num_ranks` of them hold the slots: all, or a node's.
    `seed` is not read: nothing here is drawn.
    """
    windows = load if load.ndim == 3 else load[None]
    num_layers, num_experts = windows.shape[1:]
    slots = np.empty((num_layers, num_ranks, num_slots // num_ranks), np.int64)
    index = np.empty_like(slots)
    if num_slots >= num_experts * num_ranks:
        # Every rank holds every expert, and takes its own replica: the first of each expert on every rank come first.
        held = np.arange(num_slots // num_ranks)
        slots[:] = held % num_experts
        index[:] = held // num_experts * num_ranks + np.arange(num_ranks)[:, None]
    else:
        for layer in range(num_layers):
            _from_scratch(_normalized(windows[:, layer], num_ranks), slots[layer], index[layer], world)
    return _flat(slots, index)


def improve_used(load: FloatArray, used: Slots, shape: Shape, max_copies: int | None, seed: int) -> Slots:
    """As `plan_anew`, from the placement in use, its experts staying in their node."""
    windows = load if load.ndim == 3 else load[None]
    by_rank = (len(used.experts), shape.num_ranks, -1)
    slots, index = (each.astype(np.int64).reshape(by_rank) for each in (used.experts, used.replica_index))
    copies = shape.num_slots if max_copies is None else max_copies
    kept = held_by_rank(used.experts, shape.num_ranks, shape.num_experts)
    for layer, counts in enumerate(count_replicas(used.experts, shape.num_experts)):
        tokens = _normalized(windows[:, layer], shape.num_ranks)
        limits = (kept[layer], copies, PRICE_OF_COPY, shape.num_ranks, shape.node_ranks)
        improve(slots[layer], index[layer], counts, tokens, *limits)
    return _flat(slots, index)


def mean_peaks(load: FloatArray, slots: Slots, num_ranks: int, seed: int) -> FloatArray:
    """(L,): the mean over windows of the peak-to-average load, which the plans here make small."""
    experts = slots.experts
    replicas = np.take_along_axis(count_replicas(experts, load.shape[-1]), experts, axis=1)
    shares = ranks_choosing(replicas, slots.replica_index, num_ranks) / num_ranks
    tokens = np.take_along_axis(load, np.broadcast_to(experts, (*load.shape[:-1], experts.shape[1])), axis=-1)
    peaks = peak_over_mean((tokens * shares).reshape(*load.shape[:-1], num_ranks, -1).sum(axis=-1))
    return peaks.mean(axis=0) if load.ndim == 3 else peaks


def _from_scratch(tokens: FloatArray, held: np.ndarray, index: np.ndarray, world: int) -> None:
    """Fill `held` and `index` (G, n) with the best of a few plans for `tokens` (T, E), whose replica counts differ."""
    num_ranks, num_experts = len(held), tokens.shape[1]
    weight = tokens.mean(axis=0)
    free = np.ones((num_ranks, num_experts), np.bool_)
    lowest = np.inf
    for split in [*(weight**power for power in _POWERS), weight.max() - weight]:
        trial, order = np.empty_like(held), np.empty_like(index)
        counts = count_reachable(split, held.size, num_ranks, world)
        pack(weight, counts, trial, order, world)
        peak = improve(trial, order, counts, tokens, free, 0, 0.0, world, num_ranks)
        if peak < lowest:
            held[:], index[:], lowest = trial, order, peak
        if lowest < _GOOD:
            return


def _normalized(windows: FloatArray, num_ranks: int) -> FloatArray:
    """The windows (T, E) that have load, in mean rank loads; a layer without any gets equal loads."""
    windows = windows[windows.any(axis=1)]
    return normalized(windows if len(windows) else np.ones((1, windows.shape[1])), num_ranks)


def _flat(slots: np.ndarray, index: np.ndarray) -> Slots:
    return Slots(slots.reshape(len(slots), -1).astype(np.int32), index.reshape(len(slots), -1).astype(np.int32))
