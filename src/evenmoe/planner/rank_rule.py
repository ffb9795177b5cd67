"""Planning for the `rank` rule: replica counts that the rule reaches, and each replica with the share it will get."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement

# What a copy must gain when starting from a placement in use, in mean rank loads: as for the other rules.
_PRICE_OF_COPY = 5e-4


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
        weight = tokens.mean(axis=0)
        if previous is None:
            counts = rank_kernels.count_reachable(weight, num_slots, num_ranks)
            rank_kernels.pack(weight, counts, slots[layer], index[layer])
            kept, copies, price = np.ones((num_ranks, num_experts), np.bool_), 0, 0.0
        else:
            slots[layer] = previous.slot_to_expert[layer].reshape(num_ranks, -1)
            index[layer] = previous.replica_index[layer].reshape(num_ranks, -1)
            counts = previous.num_replicas[layer].astype(np.int64)
            kept = np.zeros((num_ranks, num_experts), np.bool_)
            kept[np.arange(num_ranks)[:, None], slots[layer]] = True
            copies, price = num_slots if max_copies is None else max_copies, _PRICE_OF_COPY
        rank_kernels.improve(slots[layer], index[layer], counts, tokens, kept, copies, price)
    return _placement(slots, index, num_ranks, num_experts)


def _scaled(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Windows (T, E) with a mean rank load of 1, those without load left out; a layer without any gets equal loads."""
    windows = windows[windows.sum(axis=1) > 0]
    if not len(windows):
        windows = np.ones((1, windows.shape[1]))
    return np.ascontiguousarray(windows * (num_ranks / windows.sum(axis=1, keepdims=True)))


def _placement(slots: np.ndarray, index: np.ndarray, num_ranks: int, num_experts: int) -> Placement:
    flat = (len(slots), -1)
    return Placement(slots.reshape(flat), num_ranks, num_experts=num_experts, replica_index=index.reshape(flat))
