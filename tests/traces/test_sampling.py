"""How tokens and counts are drawn: probabilities, spread and factors, against the closed forms they stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.traces.models import find_model
from evenmoe.traces.sampling import (
    NUM_FACTORS,
    TraceParameters,
    draw_counts,
    draw_tokens,
    factor_parts,
    layer_popularity,
    overdispersion,
    parameters_of,
    pick_probability,
    request_factors,
)


def test_a_token_stops_choosing_at_the_right_time():
    """Against the race itself, for top-1, where exp(-w t) is exact only in the limit: w over the sum of w."""
    popularity = np.log(np.array([[1.0, 2.0, 3.0, 94.0], [1.0, 1.0, 1.0, 1.0]]))
    assert np.abs(pick_probability(popularity, 1)[1] - 0.25).max() < 1e-12
    for top_k in (1, 2, 3, 4):
        assert np.abs(pick_probability(popularity, top_k).sum(axis=1) - top_k).max() < 1e-9
    rng = np.random.default_rng(0)
    popularity = rng.standard_normal((1, 8))
    arrival = rng.standard_exponential((200_000, 8)) / np.exp(popularity)
    raced = np.bincount(np.argsort(arrival, axis=1)[:, :2].ravel(), minlength=8) / 200_000
    assert np.abs(pick_probability(popularity, 2) - raced).max() < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 300), st.integers(1, 8), st.integers(0, 2**32))
def test_drawn_counts_sum_and_fit(rows, experts, tokens, top_k, seed):
    rng = np.random.default_rng(seed)
    top_k = min(top_k, experts)
    probability = pick_probability(3 * rng.standard_normal((rows, experts)), top_k)
    amount = rng.integers(1, tokens, rows, endpoint=True)
    mean = probability * amount[:, None]
    counts = draw_counts(mean, mean * (1 - probability) * rng.uniform(1, 50), amount, top_k, rng)
    assert counts.sum(axis=1).tolist() == (amount * top_k).tolist()
    assert counts.min() >= 0
    assert (counts <= amount[:, None]).all()


@pytest.mark.parametrize("factor", [1.0, 9.0])
def test_drawn_counts_have_the_mean_and_the_spread(factor):
    """20,000 rows: the mean of a count is known to 0.7 % of its standard deviation, and that to 0.5 %. Fixing the sum
    takes about 1/E off the variance, 3 % here, and rounding adds at most 1/4."""
    rng = np.random.default_rng(1)
    probability = pick_probability(0.5 * rng.standard_normal((1, 32)), 4)
    mean = np.tile(1000 * probability, (20_000, 1))
    variance = mean * (1 - probability) * factor
    counts = draw_counts(mean, variance, np.full(20_000, 1000), 4, rng)
    assert np.abs((counts.mean(axis=0) - mean[0]) / np.sqrt(variance[0])).max() < 0.05
    assert np.abs(counts.var(axis=0) / variance[0] - 1).max() < 0.12


def test_overdispersion_is_that_of_drawn_tokens():
    """Counts over 64 tokens of one request, 4,000 times: their variance over a binomial's, against the closed form.

    A variance of 4,000 samples is known to 2.2 %. The closed form leaves out that every token uses 32: where 22 of 64
    experts hold most of the variance, each gives up about 1/22 of its own for what the others do; hence 15 %."""
    sticky = np.repeat([0.0, 0.5, 0.9], [20, 22, 22])
    runs = np.arange(4001) * 64
    popularity = np.zeros((1, 64))
    request = np.zeros(4000, np.int64)
    chosen = draw_tokens(popularity, sticky, request, runs, 32, (1, 1), np.random.default_rng(2))
    picked = np.zeros((len(chosen), 64), bool)
    np.put_along_axis(picked, chosen.astype(np.intp), True, axis=1)
    assert np.abs(picked.mean(axis=0) - 0.5).max() < 0.02
    found = picked.reshape(4000, 64, 64).sum(axis=1).var(axis=0) / 16
    for kind in (0.0, 0.5, 0.9):
        expected = overdispersion(np.array([kind]), 64)[0]
        assert found[sticky == kind].mean() == pytest.approx(expected, rel=0.15)


def test_tokens_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    """A run goes on from block to block: neighbours resemble each other across the border too."""
    monkeypatch.setattr("evenmoe.traces.sampling._NUMBERS_AT_ONCE", 8)
    chosen = draw_tokens(
        np.zeros((1, 8)),
        np.full(8, 0.98),
        np.zeros(2, np.int64),
        np.array([0, 500, 1000]),
        2,
        (1, 1),
        np.random.default_rng(3),
    )
    same = (np.sort(chosen[1:]) == np.sort(chosen[:-1])).all(axis=1)
    assert same.mean() > 0.8


def test_factors_are_common_to_all_layers():
    parameters = TraceParameters(0.0, 1.0, 0.0, 1.0)
    factors = request_factors(50, parameters, np.random.default_rng(0))
    for layer in (1, 2):
        popularity, sticky = layer_popularity(16, factors, parameters, np.random.default_rng(layer))
        lengths = np.linalg.svd(popularity - popularity.mean(axis=0), compute_uv=False)
        # Its largest is subtracted from each request: two lines meet in zero, so one factor gives two at most.
        assert (lengths[:3] ** 2).sum() / (lengths**2).sum() > 0.999
        assert (sticky == 0).all()
        assert np.abs(popularity.max(axis=1)).max() == 0


@pytest.mark.parametrize("part", [0.0, 0.01, 1 / 64, 0.02, 0.3, 0.9, 1.0])
def test_factor_parts(part):
    parts = factor_parts(part)
    assert parts[0] == pytest.approx(part, abs=1e-9)
    assert parts.sum() == pytest.approx(min(1, 64 * part))
    assert (np.diff(parts) <= 1e-12).all()


@pytest.mark.parametrize("requests", [1, 15, 16, 17, 100])
def test_popularity_is_the_product_of_all_requests_factors(requests):
    """It is made in pieces of 16 requests here. Sums of 64 products differ by at most 64 roundings of their parts."""
    experts, parameters = 256, parameters_of(find_model("deepseek-v3"))
    factors = request_factors(requests, parameters, np.random.default_rng(1))
    popularity, _ = layer_popularity(
        experts, factors, replace(parameters, skew=0.0, locality=0.0), np.random.default_rng(2)
    )
    random = np.random.default_rng(2)
    random.standard_normal(experts)
    loadings = random.standard_normal((NUM_FACTORS, experts))
    own = 1 - factor_parts(parameters.common_factor_share).sum()
    whole = np.einsum("rk,ke->re", factors, loadings)
    if own > 1e-9:
        whole += random.standard_normal(whole.shape) * (parameters.drift * np.sqrt(own))
    error = 2 * 64 * 2.0**-53 * (np.abs(factors) @ np.abs(loadings)).max() + 2.0**-50
    assert np.abs(popularity - (whole - whole.max(axis=1, keepdims=True))).max() <= 2 * error
