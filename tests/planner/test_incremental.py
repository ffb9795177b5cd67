"""Incremental plans: exact budgets, kept slots, more copies never hurt, small cases against all placements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.planner.incremental import plan_incremental
from evenmoe.planner.options import Shape


def random_case(seed: int, layers: int = 3) -> tuple[np.ndarray, em.Placement]:
    rng = np.random.default_rng(seed)
    ranks, width = int(rng.integers(1, 7)), int(rng.integers(1, 6))
    slots = ranks * width
    experts = int(rng.integers(max(1, width), slots + 1))
    before = rng.lognormal(0, 1.0, (layers, experts)) * 1000
    previous = em.plan(np.rint(before), num_ranks=ranks, num_slots=slots)
    return np.rint(before * rng.lognormal(0, 0.5, before.shape)), previous


def improved(load: np.ndarray, previous: em.Placement, max_copies: int | None = None) -> np.ndarray:
    """The slots of the incremental plan across nodes."""
    shape = Shape(previous.num_experts, previous.num_ranks, previous.num_slots, 1, 1)
    return plan_incremental(load, previous.slot_to_expert, shape, max_copies)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30))
def test_budget_is_kept_and_what_stays_keeps_its_slot(seed: int, budget: int) -> None:
    load, previous = random_case(seed)
    plan = em.plan(
        load, num_ranks=previous.num_ranks, num_slots=previous.num_slots, previous=previous, max_copies=budget
    )
    assert (em.count_copies(previous, plan) <= budget).all()
    assert (em.peak_to_average(load, plan) <= em.peak_to_average(load, previous) + 1e-12).all()
    assert (plan.num_replicas >= 1).all()
    width = previous.slots_per_rank
    for layer, rank in itertools.product(range(previous.num_layers), range(previous.num_ranks)):
        mine = slice(rank * width, (rank + 1) * width)
        old, new = previous.slot_to_expert[layer, mine].tolist(), plan.slot_to_expert[layer, mine].tolist()
        assert len(set(new)) == len(new)
        for expert in set(old) & set(new):
            assert old.index(expert) == new.index(expert)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_more_copies_never_make_a_layer_worse(seed: int) -> None:
    load, previous = random_case(seed)
    par = [
        em.peak_to_average(load, em.Placement(improved(load, previous, budget), previous.num_ranks))
        for budget in range(0, previous.num_slots + 1)
    ]
    for fewer, more in itertools.pairwise(par):
        assert (more <= fewer + 1e-12).all()


def test_no_copies_returns_the_placement_in_use() -> None:
    load, previous = random_case(7)
    assert (improved(load, previous, max_copies=0) == previous.slot_to_expert).all()


def test_target_is_reached_and_then_nothing_moves() -> None:
    load, previous = random_case(3)
    plan = em.plan(load, num_ranks=previous.num_ranks, num_slots=previous.num_slots, previous=previous, target_par=1.3)
    par = em.peak_to_average(load, plan)
    again = em.plan(load, num_ranks=previous.num_ranks, num_slots=previous.num_slots, previous=plan, target_par=1.3)
    for layer in range(previous.num_layers):
        if par[layer] <= 1.3:
            assert (again.slot_to_expert[layer] == plan.slot_to_expert[layer]).all()


def best_within(load: np.ndarray, previous: em.Placement, budget: int) -> float:
    """The best peak-to-average within the budget with no expert twice on a rank, by trying all placements."""
    experts, ranks, width = len(load), previous.num_ranks, previous.slots_per_rank
    held = [set(previous.slot_to_expert[0, r * width : (r + 1) * width].tolist()) for r in range(ranks)]
    choices = list(itertools.combinations(range(experts), width))
    best = np.inf
    for ranks_hold in itertools.product(choices, repeat=ranks):
        if sum(len(set(mine) - old) for mine, old in zip(ranks_hold, held, strict=True)) > budget:
            continue
        counts = np.bincount(np.ravel(ranks_hold), minlength=experts)
        if (counts == 0).any():
            continue
        share = load / counts
        best = min(best, max(share[list(mine)].sum() for mine in ranks_hold) / (load.sum() / ranks))
    return best


def test_against_all_placements_of_small_cases() -> None:
    """Of 60 small cases at budgets 1 to 4, the walk is optimal in most and never far off.

    A heuristic has no bound to derive; the limits are what was measured (53 optimal, mean excess 0.8 %), less a margin.
    """
    optimal, excess = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        experts = 5 if seed % 2 else 6
        previous = em.plan([rng.integers(50, 400, experts)], num_ranks=3, num_slots=6)
        load, budget = rng.integers(20, 500, experts).astype(float), int(rng.integers(1, 5))
        slots = improved(load[None], previous, budget)
        reached = em.peak_to_average(load[None], em.Placement(slots, 3, num_experts=experts))[0]
        best = best_within(load, previous, budget)
        assert reached >= best - 1e-12
        optimal += reached <= best + 1e-9
        excess.append(reached / best - 1)
    assert optimal >= 45
    assert np.mean(excess) <= 0.02


@pytest.mark.parametrize("windows", [1, 4])
def test_awkward_layers(windows: int) -> None:
    previous = em.Placement([[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]], num_ranks=2)
    load = np.zeros((windows, 3, 4))
    load[:, 1, 2] = 100
    load[:, 2] = [5, 5, 1, 1]
    slots = improved(load, previous, max_copies=4)
    assert (np.sort(slots, axis=1) == [0, 1, 2, 3]).all()
    assert (slots[0] == previous.slot_to_expert[0]).all()
    one_rank = em.Placement([[1, 0]], num_ranks=1)
    assert improved(np.array([[3.0, 4.0]]), one_rank).tolist() == [[1, 0]]


def test_duplicates_on_a_rank_of_the_placement_in_use_can_go() -> None:
    """Both replicas of expert 0 on rank 0 are no use there; one copy makes room for relief elsewhere."""
    previous = em.Placement([[0, 0, 1, 2]], num_ranks=2)
    load = np.array([[10.0, 10.0, 0.0]])
    slots = improved(load, previous, max_copies=1)
    assert (em.peak_to_average(load, em.Placement(slots, 2)) <= em.peak_to_average(load, previous)).all()
    assert em.count_copies(previous, em.Placement(slots, 2)).tolist() <= [1]


def test_windows_count_each_on_its_own() -> None:
    """Each rank's experts peak together; the mean over the windows is even and shows nothing."""
    load = np.array([[[9.0, 9.0, 1.0, 1.0]], [[1.0, 1.0, 9.0, 9.0]]])
    previous = em.Placement([[0, 1, 2, 3]], num_ranks=2)
    slots = improved(load, previous, max_copies=2)
    assert em.peak_to_average(load, previous).tolist() == [[1.8], [1.8]]
    assert em.peak_to_average(load, em.Placement(slots, 2)).tolist() == [[1.0], [1.0]]


def test_drifted_model_shape_needs_few_copies() -> None:
    """DeepSeek-V3's shape, 15 % drift: 30 copies a layer reach 1.010, where a new plan moves 267 (planners.md §4)."""
    rng = np.random.default_rng(5)
    popularity = np.stack([rng.permutation(1 / np.arange(1, 257)) for _ in range(8)])
    popularity *= rng.lognormal(0, 0.1, popularity.shape)
    previous = em.plan(
        rng.poisson(popularity / popularity.sum(1, keepdims=True) * 200_000), num_ranks=32, num_slots=288
    )
    drifted = popularity * rng.lognormal(0, 0.15, popularity.shape)
    load = rng.poisson(drifted / drifted.sum(1, keepdims=True) * 200_000)
    plan = em.plan(load, num_ranks=32, num_slots=288, previous=previous, max_copies=30)
    assert (em.count_copies(previous, plan) <= 30).all()
    # Measured 1.0092 ± 0.001 over 58-layer means; eight layers spread a little more.
    assert em.peak_to_average(load, plan).mean() <= 1.012
