"""The small synthetic trace is what its docstring says."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe.traces.synthesis import small_trace


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_loads_count_the_routing(seed):
    trace = small_trace(seed)
    assert trace.load.shape == (8, 4, 32)
    assert trace.routing is not None
    assert trace.routing.shape == (8 * 256, 4, 4)
    assert (trace.load.dtype, trace.routing.dtype) == (np.int64, np.uint16)
    for window in range(8):
        tokens = trace.routing[256 * window : 256 * (window + 1)]
        for layer in range(4):
            counted = [int((tokens[:, layer] == expert).sum()) for expert in range(32)]
            assert trace.load[window, layer].tolist() == counted
    assert all(len(set(row)) == 4 for row in trace.routing.reshape(-1, 4).tolist())  # distinct experts


def test_it_is_skewed_as_real_routing_is():
    """ "About 4" times the mean; over seeds and layers."""
    ratios = [load.max() / load.mean() for seed in range(5) for load in small_trace(seed).load.sum(axis=0)]
    assert 3.3 <= np.median(ratios) <= 5.6
    assert min(ratios) > 2.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_windows_drift(seed):
    """Without drift an expert's picks in a window are binomial: variance over mean at most 7/8 over 8 windows.

    The mean of 128 such ratios scatters by √(2/7)/√128 = 0.05.
    """
    load = small_trace(seed).load.astype(float)
    assert (load.var(axis=0) / load.mean(axis=0)).mean() > 1.5


def test_the_seed_decides():
    assert (small_trace(3).load == small_trace(3).load).all()
    assert (small_trace(3).routing == small_trace(3).routing).all()
    assert (small_trace(3).load != small_trace(4).load).any()
