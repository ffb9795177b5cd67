"""Paired gains: the quantile against scipy's, the limits against plain arithmetic, the rate of false claims counted."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from evenmoe.errors import ConstraintError
from evenmoe.evidence import paired_gain, t_quantile
from evenmoe.evidence.paired import block_means


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 11, 30, 101, 999])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.995, 0.9999])
def test_quantile_is_scipys(degrees, probability):
    # Bisection ends at the last bit of the quantile; the sums lose up to 1e-13 × terms where 1 − probability is small.
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)


def test_quantile_of_very_many_is_the_normal_one_nearly():
    # z(z² + 1) ÷ 4 ÷ 10,000, the first term of the expansion, is 3.7e-4 at 1 %.
    assert t_quantile(0.99, 10**9) == pytest.approx(stats.norm.ppf(0.99), abs=4e-4)


@pytest.mark.parametrize(("probability", "degrees", "value"), [(1.0, 3, "1.0"), (0.2, 3, "0.2"), (0.99, 0, "0")])
def test_quantile_says_what_it_takes(probability, degrees, value):
    with pytest.raises(ConstraintError, match=f"is {value}: it must be "):
        t_quantile(probability, degrees)


@pytest.mark.parametrize("length", [2, 3, 11, 12, 13, 100])
def test_limits_are_those_of_plain_arithmetic(length):
    random = np.random.default_rng(length)
    before, after = random.uniform(1, 2, length), random.uniform(1, 2, length)
    found = paired_gain(before, after, comparisons=3, variance=4.0)
    blocks = min(length, 12)
    means = []
    for block in range(blocks):
        run = range(block * length // blocks, (block + 1) * length // blocks)
        means.append(sum(before[i] - after[i] for i in run) / len(run))
    error = 2 * statistics.stdev(means) / math.sqrt(blocks)
    reach = 100 * stats.t.ppf(1 - 0.01 / 3, blocks - 1) * error / statistics.mean(before)
    percent = 100 * (1 - statistics.mean(after) / statistics.mean(before))
    # float64 sums of at most 100 numbers; the quantile within 1e-9
    assert found.percent == pytest.approx(percent, rel=1e-9, abs=1e-9)
    assert (found.lower, found.upper) == pytest.approx((percent - reach, percent + reach), rel=1e-8)
    assert (found.blocks, found.level) == (blocks, 0.01 / 3)


def test_one_pair_shows_nothing():
    found = paired_gain([2.0], [1.0])
    assert (found.percent, found.lower, found.upper, found.is_significant) == (50.0, -math.inf, math.inf, False)


def test_nothing_before_is_no_gain():
    found = paired_gain([0.0, 0.0], [0.0, 0.0])
    assert (found.percent, found.lower, found.is_significant) == (0.0, 0.0, False)


@pytest.mark.parametrize(("before", "after"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_pairs_must_match(before, after):
    with pytest.raises(ConstraintError, match=r"it must pair with `before`, .* and not be empty; measure both in the"):
        paired_gain(before, after)


def test_blocks_are_runs_of_neighbors():
    assert block_means(np.arange(5.0), most=2).tolist() == [0.5, 3.0]


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_false_claims_are_as_rare_as_stated(correlation):
    """Of 2000 recordings without a gain: 1 %, and 2.7 standard errors of such a count, √(.01 · .99/2000) = .22 %."""
    random = np.random.default_rng(7)
    claims = 0
    for _ in range(2000):
        noise = random.standard_normal(120)
        for i in range(1, len(noise)):
            noise[i] += correlation * noise[i - 1]
        claims += paired_gain(100 + noise, np.full(120, 100.0)).is_significant
    # Blocks of 10 of a process with correlation .8 keep .14 between neighbors' means: up to 2.5 %.
    assert claims / 2000 <= (0.016 if not correlation else 0.045)
