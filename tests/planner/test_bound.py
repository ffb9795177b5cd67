"""lower_bound: never above what a placement reaches, and as high as the cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.planner.kernels.bound import lower_bounds

# lower_bound takes a billionth off for rounding; its bisection stops a ten-billionth early.
EXACT = 2e-9


def bound(loads: list[float], num_ranks: int, num_slots: int) -> float:
    return float(em.lower_bound([loads], num_ranks=num_ranks, num_slots=num_slots)[0])


@pytest.mark.parametrize(
    ("loads", "num_ranks", "num_slots", "expected"),
    [
        ([6, 1, 1], 2, 4, 1.0),
        ([9, 1, 1, 1], 2, 4, 10 / 6),  # no spare slot: the heaviest beside the lightest
        ([8, 4], 3, 3, 4 / 4),  # replicas of 4, 4 and 4
        ([9, 3], 3, 3, 4.5 / 4),  # two halves of 9 are the least
        ([5, 5, 4, 4, 1, 1], 3, 6, 8 / (20 / 3)),  # three ranks for 5, 5, 4, 4: two of them meet, best the fours
        ([0, 0, 0], 3, 3, 1.0),
        ([7], 1, 1, 1.0),
        ([7, 1], 4, 8, 1.0),  # every rank can hold both
        # Expert 0 on all 32 ranks leaves 256 slots to 255 ones: two halves, and 30 ranks with eight whole ones.
        ([2295] + [1] * 255, 32, 288, (2295 / 32 + 8) / (2550 / 32)),
    ],
)
def test_cases_by_hand(loads: list[float], num_ranks: int, num_slots: int, expected: float) -> None:
    assert bound(loads, num_ranks, num_slots) == pytest.approx(expected, rel=EXACT)


def test_an_expert_on_every_rank_leaves_a_smaller_problem() -> None:
    # 30 ranks of 3 slots. On 29 ranks expert 0 would leave two fives beside 1800 / 29, 72.1 tokens; on all 30 it leaves
    # 60 slots to 60 experts, 5.5 + 5 beside 60.
    loads = [1800.0, 5.5] + [5.0] * 59
    mean = 60 + (5.5 + 59 * 5) / 30
    assert bound(loads, 30, 90) == pytest.approx(70.5 / mean, rel=EXACT)
    assert em.peak_to_average([loads], em.plan([loads], num_ranks=30, num_slots=90))[0] == pytest.approx(70.5 / mean)


@st.composite
def placements(draw: st.DrawFn) -> tuple[np.ndarray, em.Placement]:
    """A load, and some placement that never puts two replicas of an expert on one rank."""
    num_ranks, num_experts = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    least = -(-num_experts // num_ranks)
    width = min(num_experts, draw(st.integers(least, least + 2)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = np.ones(num_experts, int)
    while counts.sum() < num_ranks * width:
        counts[random.choice(np.flatnonzero(counts < num_ranks))] += 1
    # One slot after another to rank 0, 1, …: at most G replicas in a row never meet.
    slots = np.concatenate([np.repeat(e, counts[e]) for e in random.permutation(num_experts)])
    load = random.lognormal(0, draw(st.sampled_from([0.1, 1.0, 2.0])), (1, num_experts))
    load[0, 0] += load.sum() * draw(st.sampled_from([0, 1, 9]))
    return load, em.Placement(slots.reshape(width, num_ranks).T.reshape(1, -1), num_ranks, num_experts=num_experts)


@settings(max_examples=300, deadline=None)
@given(placements())
def test_no_placement_beats_it(case: tuple[np.ndarray, em.Placement]) -> None:
    load, placement = case
    num_ranks, num_slots = placement.num_ranks, placement.num_slots
    best = em.plan(load, num_ranks=num_ranks, num_slots=num_slots)
    limit = em.lower_bound(load, num_ranks=num_ranks, num_slots=num_slots)[0]
    assert 1 <= limit <= em.peak_to_average(load, placement)[0] * (1 + EXACT)
    assert limit <= em.peak_to_average(load, best)[0] * (1 + EXACT)


def test_what_the_published_bound_misses() -> None:
    # max(1, least largest replica / mean): 5.18 for these loads, where the lightest co-located experts make it 5.30.
    random = np.random.default_rng(0)
    weight = random.permuted(1.0 / np.arange(1, 257))
    load = random.poisson(weight / weight.sum() * 200_000).astype(float)
    published = load.max() / (load.sum() / 32)
    ours = bound(load.tolist(), 32, 256)
    lightest = np.sort(load)[:7].sum() / (load.sum() / 32)
    assert ours == pytest.approx(published + lightest, rel=EXACT)
    assert em.peak_to_average([load], em.plan([load], num_ranks=32, num_slots=256))[0] == pytest.approx(ours, rel=1e-8)


def test_a_hot_expert_and_others_that_do_not_fit_beside_it() -> None:
    # Nine tenths of the load in one expert, Zipf the others: on 29 ranks it leaves too little room for what the three
    # others cannot hold, on 31 or 32 too few ranks without it. On 30, two ranks with the heaviest are not full.
    random = np.random.default_rng(6)
    rest = np.stack([random.permutation(1.0 / np.arange(1, 256)) for _ in range(4)]) * random.lognormal(
        0, 0.1, (4, 255)
    )
    load = np.concatenate([9 * rest.sum(axis=1, keepdims=True), rest], axis=1)
    limit = em.lower_bound(load, num_ranks=32, num_slots=288)
    placement = em.plan(load, num_ranks=32, num_slots=288)
    assert (placement.num_replicas[:, 0] == 30).all()
    assert (limit > 1.003).all()
    assert (em.peak_to_average(load, placement) / limit).mean() <= 1.001


def test_counts_rise_only() -> None:
    # A share that shrinks with its count can become the lightest of those co-located; the tests once went to and fro.
    loads = np.array([[23.74, 21.57, 19.16, 16.91, 16.81, 16.45, 11.05]])
    peaks = np.array([np.inf])
    lower_bounds(loads, 4, 3, peaks)
    assert peaks[0] == pytest.approx(loads.sum() / 4)


def test_windows_are_bounded_one_by_one() -> None:
    load = np.random.default_rng(1).lognormal(0, 1, (3, 2, 16))
    limit = em.lower_bound(load, num_ranks=8, num_slots=16)
    assert limit.shape == (3, 2)
    assert np.array_equal(limit[1], em.lower_bound(load[1], num_ranks=8, num_slots=16))


def test_nodes_raise_the_bound() -> None:
    load = np.ones((1, 16))
    load[0, :4] = 9  # group 0
    assert em.lower_bound(load, num_ranks=4, num_slots=16)[0] == pytest.approx(1, rel=EXACT)
    # The node with group 0 has at least one group more: 36 + 4 of 48 tokens on two of four ranks.
    limit = em.lower_bound(load, num_ranks=4, num_slots=16, num_nodes=2, num_groups=4)
    assert limit[0] == pytest.approx(20 / 12, rel=EXACT)
