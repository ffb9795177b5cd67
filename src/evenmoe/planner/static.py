"""The static plan: one load vector per layer, counts and packing together."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray
from evenmoe.planner._greedy import pack_layers
from evenmoe.planner._search import even_layers


def plan_static(load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0) -> IntArray:
    """The slots int32 (L, S) of a placement for `load` float64 (L, E); see `plan`."""
    num_layers, num_experts = load.shape
    width = num_slots // num_ranks
    if width >= num_experts:
        # Every rank holds every expert equally often, so all ranks are equal.
        return np.tile(np.arange(width, dtype=np.int32) % num_experts, (num_layers, num_ranks))
    load = np.ascontiguousarray(load)
    order = np.argsort(-load, axis=1)
    slots = np.empty((num_layers, num_ranks, width), np.int64)
    pack_layers(load, order, slots)
    loads = np.take_along_axis(load, order, axis=1)
    peaks = np.empty(num_layers)
    even_layers(loads, 3e-4, slots, peaks)
    return np.take_along_axis(order, slots.reshape(num_layers, num_slots), axis=1).astype(np.int32)
