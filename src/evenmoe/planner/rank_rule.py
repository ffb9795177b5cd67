"""Planning for the `rank` rule: replica counts that the rule reaches, and each replica with the share it will get."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray, Placement

# What a copy must gain when starting from a placement in use, in mean rank loads: as for the other rules.
PRICE_OF_COPY = 5e-4
# Replica counts are tried for the loads to these powers, until a mean peak is good. With many slots the first is. Last
# the lightest are replicated: with few slots two halves of a light expert can fill up ranks best.
_POWERS = (1.0, 0.8, 1.25, 0.5, 0.0)
_GOOD = 1.005


def plan_rank_rule(load: FloatArray, num_ranks: int, num_slots: int, world: int) -> tuple[IntArray, IntArray]:
    """Slots and `replica_index`, int32 (L, S), for `load` float64 (L, E) or (T, L, E).

    Rank r of the `world` takes replica r // ceil(world / count); `num_ranks` of them hold the slots: all, or a node's.
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
            _from_scratch(_scaled(windows[:, layer], num_ranks), slots[layer], index[layer], world)
    return _flat(slots), _flat(index)


def improve_rank_rule(
    load: FloatArray, previous: Placement, max_copies: int | None, num_nodes: int = 1
) -> tuple[IntArray, IntArray]:
    """As `plan_rank_rule`, from the placement in use, its experts staying in their node."""
    from evenmoe.planner import rank_kernels  # not at the top: importing numba takes 0.3 s

    windows = load if load.ndim == 3 else load[None]
    num_ranks, shape = previous.num_ranks, (previous.num_layers, previous.num_ranks, -1)
    slots = previous.slot_to_expert.astype(np.int64).reshape(shape)
    index = previous.replica_index.astype(np.int64).reshape(shape)
    copies = previous.num_slots if max_copies is None else max_copies
    for layer in range(previous.num_layers):
        kept = np.zeros((num_ranks, previous.num_experts), np.bool_)
        kept[np.arange(num_ranks)[:, None], slots[layer]] = True
        rank_kernels.improve(
            slots[layer],
            index[layer],
            previous.num_replicas[layer].astype(np.int64),
            _scaled(windows[:, layer], num_ranks),
            kept,
            copies,
            PRICE_OF_COPY,
            num_ranks,
            num_ranks // num_nodes,
        )
    return _flat(slots), _flat(index)


def _from_scratch(tokens: FloatArray, held: np.ndarray, index: np.ndarray, world: int) -> None:
    """Fill `held` and `index` (G, n) with the best of a few plans for `tokens` (T, E), whose replica counts differ."""
    from evenmoe.planner import rank_kernels

    num_ranks, num_experts = len(held), tokens.shape[1]
    weight = tokens.mean(axis=0)
    free = np.ones((num_ranks, num_experts), np.bool_)
    lowest = np.inf
    for split in [*(weight**power for power in _POWERS), weight.max() - weight]:
        trial, order = np.empty_like(held), np.empty_like(index)
        counts = rank_kernels.count_reachable(split, held.size, num_ranks, world)
        rank_kernels.pack(weight, counts, trial, order, world)
        peak = rank_kernels.improve(trial, order, counts, tokens, free, 0, 0.0, world, num_ranks)
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


def _flat(slots: np.ndarray) -> IntArray:
    return slots.reshape(len(slots), -1).astype(np.int32)
