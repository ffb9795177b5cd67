"""Statistics of traces against plain loops, and the properties that they have."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.traces.statistics import common_factor_share, drift, gini, locality, skew


@st.composite
def loads(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = rng.integers(0, draw(st.sampled_from([2, 30, 10**6])), shape)
    return load * rng.integers(0, 2, shape) if draw(st.booleans()) else load


@settings(max_examples=80, deadline=None)
@given(loads())
def test_skew_and_gini_by_hand(load):
    for layer in range(load.shape[1]):
        total = [sum(int(w[layer][e]) for w in load) for e in range(load.shape[2])]
        experts, tokens = len(total), sum(total)
        busiest = Fraction(max(total) * experts, tokens) if tokens else Fraction(1)
        apart = sum(abs(a - b) for a in total for b in total)
        uneven = Fraction(apart, 2 * experts * tokens) if tokens else Fraction(0)
        assert skew(load)[layer] == pytest.approx(float(busiest), rel=1e-12)
        assert gini(load)[layer] == pytest.approx(float(uneven), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(loads())
def test_drift_by_hand(load):
    for layer in range(load.shape[1]):
        total = load[:, layer].sum(axis=0)
        squares, windows = 0.0, 0
        for window in load[:, layer]:
            assignments = int(window.sum())
            if assignments == 0:
                continue
            windows += 1
            for expert, count in enumerate(window.tolist()):
                mean = total[expert] / total.sum()
                if mean > 0:
                    squares += (count / assignments - mean) ** 2 / mean - (1 - mean) / assignments
        expected = math.sqrt(max(squares / windows, 0.0)) if windows else 0.0
        # The square is a difference of numbers up to E: what rounding leaves of zero is its root.
        assert drift(load)[layer] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_drift_takes_sampling_noise_off():
    """Multinomial windows of one popularity do not drift: the square's mean is 0, its deviation over 4,000 windows of
    63 degrees of freedom √(2 · 63) / 500 / √4000 = 0.0004; five of them, and the root."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.ones(64))
    load = rng.multinomial(500, popularity, (4000, 1))
    assert drift(load)[0] < math.sqrt(5 * 0.0004)
    moved = np.concatenate([load, rng.multinomial(500, popularity[::-1], (4000, 1))])
    mean = (popularity + popularity[::-1]) / 2
    expected = math.sqrt((((popularity - mean) ** 2) / mean).sum())
    assert drift(moved)[0] == pytest.approx(expected, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(loads(), st.integers(1, 4))
def test_common_factor_share_by_hand(load, factors):
    rows = []
    for window in load:
        row = []
        for layer, counts in enumerate(window):
            total = load[:, layer].sum(axis=0)
            for expert, count in enumerate(counts.tolist()):
                known = counts.sum() > 0 and total[expert] > 0
                mean = total[expert] / total.sum() if known else 1.0
                row.append((count / counts.sum() - mean) / math.sqrt(mean) if known else 0.0)
        rows.append(row)
    lengths = np.linalg.svd(np.array(rows), compute_uv=False) ** 2
    if lengths.sum() > 1e-12:
        assert common_factor_share(load, factors) == pytest.approx(lengths[:factors].sum() / lengths.sum(), abs=1e-7)
    assert common_factor_share(load, 100) == pytest.approx(1.0)


def test_common_factor_share_of_more_windows_than_experts_is_the_same():
    """Either matrix of products: windows are repeated until they outnumber the experts."""
    load = np.random.default_rng(1).integers(1, 50, (5, 2, 6))
    assert common_factor_share(np.tile(load, (4, 1, 1)), 2) == pytest.approx(common_factor_share(load, 2))
    assert common_factor_share(np.full((3, 1, 4), 7)) == 1.0
    assert common_factor_share(np.zeros((3, 1, 4))) == 1.0
    for factors in (0, -1):
        with pytest.raises(ConstraintError, match="`num_factors` is"):
            common_factor_share(load, factors)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(0, 9), max_size=4), st.integers(1, 4), st.integers(0, 2**32))
def test_locality_by_hand(top_k, lengths, lag, seed):
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    routing = rng.permuted(np.tile(np.arange(5), (tokens, 2, 1)), axis=2)[:, :, :top_k].astype(np.uint16)
    starts = np.cumsum([0, *lengths])
    found = locality(routing, starts, lag=lag)
    for layer in range(2):
        chosen = [set(row) for row in routing[:, layer].tolist()]
        shared, expected = 0, Fraction(0)
        for start, length in zip(starts.tolist(), lengths, strict=False):
            request = chosen[start : start + length]
            if length <= lag:
                continue
            shared += sum(len(a & b) for a, b in zip(request, request[lag:], strict=False))
            pairs = [len(a & b) for i, a in enumerate(request) for j, b in enumerate(request) if i != j]
            expected += (length - lag) * Fraction(sum(pairs), len(pairs))
        assert found[layer] == pytest.approx(float(shared / expected) if expected else 1.0)
    if lengths == [tokens]:
        assert locality(routing, lag=lag).tolist() == found.tolist()


def test_locality_refuses():
    with pytest.raises(ConstraintError, match="`lag` is 0: it must be at least 1; 1 compares neighbors"):
        locality([[[0]], [[0]]], lag=0)


@pytest.mark.parametrize("statistic", [skew, gini, drift, common_factor_share])
def test_loads_are_checked(statistic):
    for wrong in ([1, 2], [[[-1, 2]]], [[np.nan, 1]], np.zeros((0, 1, 2))):
        with pytest.raises(ConstraintError, match="`load` is"):
            statistic(wrong)


def test_nothing_to_say():
    empty = np.zeros((3, 2, 4))
    assert skew(empty).tolist() == [1, 1]
    assert gini(empty).tolist() == drift(empty).tolist() == [0, 0]
    assert drift([[5, 1]]).tolist() == [0]
