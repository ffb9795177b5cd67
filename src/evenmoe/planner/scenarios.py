"""Scenarios: the loads that a placement for the `batch` rule should be able to even out."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from evenmoe.metrics import FloatArray

# Standard deviations of the logarithm of a load's drift, whose size is not known beforehand. With 0.3 alone plans are
# 0.2 % better where the drift is exactly 0.3 (288 slots on 32 ranks), and no better where it is larger.
_DRIFTS = (0.2, 0.3, 0.45)
# With recorded windows the drift is in them already; this much keeps a plan from fitting a few windows too closely.
JITTER = 0.2


def drift_factors(num_scenarios: int, num_experts: int, seed: int, sizes: tuple[float, ...] = _DRIFTS) -> FloatArray:
    """Factors float64 (N, E) of drifted loads: lognormal with the sizes in turn, each expert evenly over its quantiles.

    Even quantiles (Latin hypercube) because 32 free draws would show a rank's experts hotter or colder than they are.

    >>> drift_factors(3, 1, seed=0, sizes=(0.0,)).tolist()
    [[1.0], [1.0], [1.0]]
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / num_scenarios) for i in range(num_scenarios)])
    deviates = np.random.default_rng(seed).permuted(np.tile(quantiles, (num_experts, 1)), axis=1).T
    return np.exp(np.resize(sizes, num_scenarios)[:, None] * deviates)


def scenarios_of(windows: FloatArray, num_ranks: int, drifted: FloatArray, jittered: FloatArray) -> FloatArray:
    """The scenarios of one layer, float64 (N, E), each with a mean rank load of 1.

    Args:
        windows: (T, E), what was recorded; windows without load are left out. One window is drifted; of more each
            stands for itself, and they are repeated with jitter until there are enough.
        drifted, jittered: factors (N, E) for either case. More than 2 N windows are thinned evenly to 2 N.
    """
    windows = windows[windows.sum(axis=1) > 0]
    enough = len(drifted)
    if len(windows) == 1:
        loads = windows * drifted
    else:
        windows = windows[:: -(-len(windows) // (2 * enough))]
        more = np.resize(np.arange(len(windows)), max(enough - len(windows), 0))
        loads = np.concatenate([windows, windows[more] * jittered[: len(more)]])
    return np.ascontiguousarray(loads * (num_ranks / loads.sum(axis=1, keepdims=True)))
