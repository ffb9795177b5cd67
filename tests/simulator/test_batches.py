"""Batches: recorded tokens assigned to ranks, counts drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.simulator.batch_kernels import draw_counts, share_by_row
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


@pytest.mark.parametrize(
    ("chance", "tokens"), [(0.5, 1), (0.03, 128), (0.97, 128), (0.2, 5000), (1e-6, 4096), (0.999999, 64)]
)
def test_counts_are_binomial(chance, tokens):
    """Every value's frequency among 200,000 draws, within 6 standard deviations and the 2^-32 of the method."""
    ranks = 200_000
    counts = np.zeros((2, ranks), np.int32)
    draw_counts(np.full((2, 1), chance), tokens, 0, 1, 2, counts)
    values = np.arange(tokens + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(tokens, 0, -1) / np.arange(1, tokens + 1)))])
    probability = np.exp(logs + values * np.log(chance) + (tokens - values) * np.log1p(-chance))
    for row in counts:
        seen = np.bincount(row, minlength=tokens + 1)
        assert len(seen) == tokens + 1
        reach = 6 * np.sqrt(ranks * probability * (1 - probability)) + ranks * 2.0**-31 + 1
        assert (np.abs(seen - ranks * probability) <= reach).all()
    assert abs(np.corrcoef(counts)[0, 1]) < 6 / np.sqrt(ranks) or counts.std(axis=1).min() == 0
    assert abs(np.corrcoef(counts[0, :-1], counts[0, 1:])[0, 1]) < 6 / np.sqrt(ranks)


def test_certain_and_impossible_experts():
    counts = np.full((2, 3), -1, np.int32)
    draw_counts(np.array([[0.0], [1.0]]), 7, 0, 0, 0, counts)
    assert counts.tolist() == [[0, 0, 0], [7, 7, 7]]


def test_steps_layers_and_seeds_draw_apart():
    def draw(seed, step, layer):
        counts = np.zeros((4, 50), np.int32)
        draw_counts(np.full((4, 1), 0.3), 40, seed, step, layer, counts)
        return counts.tolist()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert draw(*keys[0]) == draw(*keys[0])
    assert len({str(draw(*key)) for key in keys}) == 4


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


def test_rows_are_drawn_without_replacement():
    """7 rows of 12 on three replicas, rows 0, 3, 6, 9 for the first: a hypergeometric mean of 7 / 3."""
    ranks = 20_000
    counts = np.stack([np.full(ranks, 7, np.int32), np.full(ranks, 12, np.int32), np.full(ranks, 5, np.int32)])
    first, slots = np.array([0, 3, 5, 6]), np.array([4, 0, 2, 1, 5, 3])
    per_slot = np.zeros((6, ranks), np.int32)
    share_by_row(counts, 12, first, slots, 0, 0, 0, per_slot)
    np.testing.assert_array_equal(per_slot[[4, 0, 2]].sum(axis=0), counts[0])
    assert per_slot[[4, 0, 2]].max() == 4
    assert (per_slot[[1, 5]] == 6).all()
    np.testing.assert_array_equal(per_slot[3], counts[2])
    # variance of the hypergeometric number: n K (N - K) (N - n) / (N² (N - 1))
    deviation = np.sqrt(7 * 4 * 8 * 5 / (144 * 11) / ranks)
    assert (np.abs(per_slot[[4, 0, 2]].mean(axis=1) - 7 / 3) < 6 * deviation).all()
