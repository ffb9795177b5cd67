"""The PAR of a balanced router: by draws that share nothing with the code, by enumeration, and by counting claims."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evenmoe.errors import ConstraintError
from evenmoe.evidence import balanced_par, unevenness


@pytest.mark.parametrize(("size", "ranks"), [(1, 2), (2, 2), (3, 4), (6, 3), (5, 8)])
def test_small_sizes_are_those_of_all_outcomes(size, ranks):
    pars = []
    for outcome in itertools.islice(itertools.product(range(ranks), repeat=size), 40_000):
        pars.append(max(outcome.count(rank) for rank in range(ranks)) * ranks / size)
    mean = sum(pars) / len(pars)
    deviation = math.sqrt(sum((par - mean) ** 2 for par in pars) / len(pars))
    found, found_deviation, _, error = (float(value) for value in balanced_par(size, ranks))
    assert abs(found - mean) <= 4 * error + 1e-12  # four standard errors of the draws that it is made of
    assert found_deviation == pytest.approx(
        deviation, rel=0.1, abs=1e-12
    )  # of 4096 draws: 4 · 1/√(2 · 4096), and tails


@pytest.mark.parametrize("ranks", [2, 8, 33, 160])
@pytest.mark.parametrize("size", [17, 100, 1234, 1e6, 1e15, 1e17])
def test_sizes_between_the_grids_are_those_of_draws(size, ranks):
    random = np.random.default_rng(5)
    draws = np.array([random.multinomial(int(size), [1 / ranks] * ranks).max() for _ in range(3000)]) * ranks / size
    mean, deviation, _, error = (float(value) for value in balanced_par(size, ranks))
    own_error = draws.std() / math.sqrt(3000)
    # Four standard errors of either; a line between sizes that differ by 19 % misses a smooth curve by far less.
    assert abs(mean - draws.mean()) <= 4 * math.hypot(error, own_error)
    assert deviation == pytest.approx(draws.std(), rel=0.25)  # 800 draws at least: 4 · √(kurtosis/4/800)


def test_less_than_one_assignment_counts_as_one():
    assert [float(value[0]) for value in balanced_par(np.array([0.0]), 4)[:2]] == [4.0, 0.0]


@pytest.mark.parametrize(
    ("windows", "layers", "ranks", "size"),
    [(1, 1, 2, 10), (1, 1, 8, 5), (1, 1, 8, 300), (20, 3, 8, 64), (3, 4, 32, 999)],
)
def test_balanced_routers_are_seldom_called_uneven(windows, layers, ranks, size):
    """Of 1500 at most 1.6 %: the level of 1 % and 2.3 standard errors of such a count, √(.01 · .99/1500) = .26 %."""
    random = np.random.default_rng(3)
    loads = random.multinomial(size, [1 / ranks] * ranks, size=(1500, windows, layers))
    assert sum(unevenness(each).is_uneven for each in loads) <= 24


def test_a_layer_without_tokens_says_nothing():
    loads = np.array([[[30, 10], [0, 0]], [[0, 0], [0, 0]]])
    found, alone = unevenness(loads), unevenness(loads[:1, :1])
    assert (found.par, found.limit, found.assignments) == (alone.par, alone.limit, 40.0)


def test_nothing_at_all_is_not_uneven():
    found = unevenness(np.zeros((2, 3, 4)))
    assert (found.par, found.total_par, found.assignments, found.is_uneven) == (1.0, 1.0, 0.0, False)


def test_windows_may_be_uneven_while_their_sum_is_not():
    loads = np.array([[[900, 100]], [[100, 900]]])
    found = unevenness(loads)
    assert (found.par, found.total_par, found.is_uneven) == (1.8, 1.0, True)


def test_clustered_counts_need_more():
    loads = [[[130, 70]]]
    assert unevenness(loads).is_uneven
    assert not unevenness(loads, variance=27.0).is_uneven


def test_one_rank_is_even():
    assert not unevenness([[[7]]]).is_uneven


def test_loads_have_three_axes():
    with pytest.raises(
        ConstraintError, match=r"`loads` is an array of shape \(2, 2\): it must be \(windows, layers, r"
    ):
        unevenness(np.ones((2, 2)))
