"""Planning for the `rank` rule: replica counts that the rule reaches, and each replica with the share it will get."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement

# What a copy must gain when starting from a placement in use, in mean rank loads: as for the other rules.
_PRICE_OF_COPY = 5e-4
# Replica counts are tried for the loads to these powers, until a mean peak is good. With many slots the first is.
_POWERS = (1.0, 0.8, 1.25, 0.5, 0.0)
_GOOD = 1.005


def plan_rank_rule(
    load: FloatArray,
    num_ranks: int,
    num_slots: int,
    previous: Placement | None = None,
    max_copies: int | None = None,
) -> Placement:
    """The placement for `load` float64 (L, E) or (T, L, E) when rank r takes replica r // ceil(G / count).

    The world of source ranks is the `num_ranks` that hold the slots. `replica_index` says which slot gets which share.
    Arguments as in `plan`; without `previous` as many copies as it takes.
    """
    from evenmoe.planner import rank_kernels  # not at the top: importing numba takes 0.3 s

    windows = load if load.ndim == 3 else load[None]
    num_layers, num_experts = windows.shape[1:]
    slots = np.empty((num_layers, num_ranks, num_slots // num_ranks), np.int64)
    index = np.empty_like(slots)
    if num_slots >= num_experts * num_ranks:
        # Every rank holds every expert, and takes its own replica: the first of each expert on every rank come first.
        held = np.arange(num_slots // num_ranks)
        slots[:] = held % num_experts
        index[:] = held // num_experts * num_ranks + np.arange(num_ranks)[:, None]
        return _placement(slots, index, num_ranks, num_experts)
    for layer in range(num_layers):
        tokens = _scaled(windows[:, layer], num_ranks)
        if previous is None:
            _from_scratch(tokens, slots[layer], index[layer])
        else:
            slots[layer] = previous.slot_to_expert[layer].reshape(num_ranks, -1)
            index[layer] = previous.replica_index[layer].reshape(num_ranks, -1)
            counts = previous.num_replicas[layer].astype(np.int64)
            kept = np.zeros((num_ranks, num_experts), np.bool_)
            kept[np.arange(num_ranks)[:, None], slots[layer]] = True
            copies = num_slots if max_copies is None else max_copies
            rank_kernels.improve(slots[layer], index[layer], counts, tokens, kept, copies, _PRICE_OF_COPY)
    return _placement(slots, index, num_ranks, num_experts)


def _from_scratch(tokens: FloatArray, held: np.ndarray, index: np.ndarray) -> None:
    """Fill `held` and `index` (G, n) with the best of a few plans for `tokens` (T, E), whose replica counts differ."""
    from evenmoe.planner import rank_kernels

    num_ranks, num_experts = len(held), tokens.shape[1]
    weight = tokens.mean(axis=0)
    free = np.ones((num_ranks, num_experts), np.bool_)
    loads = np.empty((len(tokens), num_ranks))
    lowest = np.inf
    for power in _POWERS:
        trial, order = np.empty_like(held), np.empty_like(index)
        counts = rank_kernels.count_reachable(weight**power, held.size, num_ranks)
        rank_kernels.pack(weight, counts, trial, order)
        rank_kernels.improve(trial, order, counts, tokens, free, 0, 0.0)
        rank_kernels.rank_loads(trial, order, counts, tokens, loads)
        peak = loads.max(axis=1).mean()
        if peak < lowest:
            held[:], index[:], lowest = trial, order, peak
        if lowest < _GOOD:
            return


def _scaled(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Windows (T, E) with a mean rank load of 1, those without load left out; a layer without any gets equal loads."""
    windows = windows[windows.sum(axis=1) > 0]
    if not len(windows):
        windows = np.ones((1, windows.shape[1]))
    return np.ascontiguousarray(windows * (num_ranks / windows.sum(axis=1, keepdims=True)))


def _placement(slots: np.ndarray, index: np.ndarray, num_ranks: int, num_experts: int) -> Placement:
    flat = (len(slots), -1)
    return Placement(slots.reshape(flat), num_ranks, num_experts=num_experts, replica_index=index.reshape(flat))
