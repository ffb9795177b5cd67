"""The static plan: one load vector per layer, counts and packing together."""

from __future__ import annotations

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray
from evenmoe.planner._search import plan_layers


def plan_static(load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0) -> IntArray:
    """The slots int32 (L, S) of a placement for `load` float64 (L, E); see `plan`."""
    num_experts = load.shape[1]
    width = num_slots // num_ranks
    if width >= num_experts:
        # Every rank holds every expert equally often, so all ranks are equal.
        return np.tile(np.arange(num_slots // num_ranks, dtype=np.int32) % num_experts, (load.shape[0], num_ranks))
    slots = np.empty((load.shape[0], num_slots), np.int32)
    plan_layers(np.ascontiguousarray(load), num_ranks, num_slots, seed, slots)
    return slots
