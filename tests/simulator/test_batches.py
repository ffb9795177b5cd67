"""Batches: recorded tokens assigned to ranks, counts drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.simulator.batches import Cluster, DrawnBatches, RoutedBatches, expert_chances
from evenmoe.traces.trace import Trace


def counted(batches, steps: int, layers: int, experts: int, ranks: int) -> np.ndarray:
    found = np.zeros((steps, layers, experts, ranks), np.int32)
    for step in range(steps):
        batches.advance()
        for layer in range(layers):
            batches.count(layer, found[step, layer])
    return found


def test_tokens_are_assigned_by_request():
    """Three requests of 3, 0 and 5 tokens on two ranks of two tokens; the token's number is its expert."""
    trace = Trace("t", np.ones((1, 1, 8), np.int64), np.arange(8)[:, None, None], np.array([0, 3, 3, 8]))
    batches = RoutedBatches(trace, Cluster(2, 1, 2), chunk=2)
    steps = []
    for _ in range(4):
        batches.advance()
        steps.append(batches.experts(slice(0, 1))[0, :, :, 0].tolist())
    # Rank 0 ends its request in the second step and begins the first again; rank 1 does so after its fifth token.
    assert steps == [[[0, 1], [3, 4]], [[2, 0], [5, 6]], [[1, 2], [7, 3]], [[0, 1], [4, 5]]]


def test_decode_advances_every_request_by_one_token():
    trace = Trace("t", np.ones((1, 1, 8), np.int64), np.arange(8)[:, None, None], np.array([0, 2, 4, 6, 8]))
    batches = RoutedBatches(trace, Cluster(2, 1, 2), chunk=1)
    batches.advance()
    assert batches.experts(slice(0, 1))[0, :, :, 0].tolist() == [[0, 2], [4, 6]]
    batches.advance()
    assert batches.experts(slice(0, 1))[0, :, :, 0].tolist() == [[1, 3], [5, 7]]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_chances_add_up_to_the_experts_of_a_token(load, top_k):
    values = np.array(load)
    chances = expert_chances(values, top_k)
    assert ((chances >= 0) & (chances <= 1)).all()
    assert (chances[values == 0] == 0).all()
    # sums of 12 terms up to 12, a few roundings each
    assert chances.sum() == pytest.approx(min(top_k, np.count_nonzero(values)), rel=1e-12)
    order = np.argsort(values)
    assert (np.diff(chances[order]) >= -1e-12).all()
    free = (chances < 1) & (values > 0)
    if free.any():
        assert np.ptp(chances[free] / values[free]) <= 1e-9 * (chances[free] / values[free]).max()


def only(windows: list[int], experts: int = 4) -> np.ndarray:
    """Windows (T, 1, E), in which all tokens pick the one expert named."""
    load = np.zeros((len(windows), 1, experts), np.int64)
    load[np.arange(len(windows)), 0, windows] = 9
    return load


@pytest.mark.parametrize(
    ("windows", "steps", "expected"),
    [
        ([0, 1, 2], 6, [{0}, {0}, {1}, {1}, {2}, {2}]),
        ([0, 1, 2, 3], 2, [{0, 1}, {2, 3}]),
        ([0, 1, 2], 2, [{0}, {1, 2}]),
        ([3], 2, [{3}, {3}]),
    ],
)
def test_windows_are_stretched_or_condensed(windows, steps, expected):
    batches = DrawnBatches(Trace("t", only(windows)), Cluster(2, 1, 64), steps, 1, 0)
    found = counted(batches, steps, 1, 4, 2)
    assert [set(np.flatnonzero(step[0].sum(axis=1)).tolist()) for step in found] == expected


@pytest.mark.parametrize(
    ("recorded", "ranks", "expected"),
    [
        ([0, 1], 4, [{0}, {0}, {1}, {1}]),
        ([0, 1, 2, 3], 2, [{0, 1}, {2, 3}]),
        ([0, 1, 2], 2, [{0}, {1, 2}]),
        ([2], 3, [{2}, {2}, {2}]),
        ([0, 3, 1], 3, [{0}, {3}, {1}]),
    ],
)
def test_loads_by_rank_stay_with_their_ranks(recorded, ranks, expected):
    by_rank = only(recorded)[None, :, :, :]  # one window, (1, R, 1, E)
    batches = DrawnBatches(Trace("t", by_rank.sum(axis=1), load_by_rank=by_rank), Cluster(ranks, 1, 64), 1, 1, 0)
    found = counted(batches, 1, 1, 4, ranks)[0, 0]
    assert [set(np.flatnonzero(found[:, rank]).tolist()) for rank in range(ranks)] == expected
