"""Plans that cannot depend on what the experts are called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray


def by_load(planner: Callable[..., IntArray], load: FloatArray, *options: int) -> IntArray:
    """Call `planner` with the experts of each layer in descending order of load, and give them back their names.

    Args:
        planner: takes windows float64 (T, L, E) and `options`, gives slots int32 (L, S).
        load: tokens float64 (T, L, E). Equal loads keep the order of their ids.
    """
    order = np.argsort(-load.mean(axis=0), axis=1, kind="stable")
    slots = planner(np.take_along_axis(load, order[None], axis=2), *options)
    return np.take_along_axis(order, slots, axis=1).astype(np.int32)
