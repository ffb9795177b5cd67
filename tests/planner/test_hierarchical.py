"""Groups stay inside nodes, and they are packed into nodes as well as they can be."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.metrics import even_rank_loads
from evenmoe.planner.hierarchical import all_packings, best_packings, count_packings, even_packing

# As in the optimum tests: what the exhaustive search may leave, and rounding.
SAME = 2e-9
# The README of deepseek-ai/EPLB: two layers, 16 slots, 4 groups, 2 nodes, 8 ranks.
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)


def check_groups(placement: em.Placement, num_nodes: int, num_groups: int) -> None:
    per_node = placement.num_slots // num_nodes
    size = placement.num_experts // num_groups
    for row in placement.slot_to_expert:
        groups = [set((row[n * per_node : (n + 1) * per_node] // size).tolist()) for n in range(num_nodes)]
        assert sorted(group for node in groups for group in node) == list(range(num_groups))  # each in one node only
        assert {len(node) for node in groups} == {num_groups // num_nodes}


def best_by_hand(load: np.ndarray, num_ranks: int, num_slots: int, num_nodes: int, num_groups: int) -> float:
    """The busiest rank's tokens with the best of all packings, every node planned by itself: one layer."""
    groups = load.reshape(num_groups, -1)
    each = num_groups // num_nodes
    best = np.inf
    for order in permutations(range(num_groups)):
        nodes = [sorted(order[n * each : (n + 1) * each]) for n in range(num_nodes)]
        if [sorted(node) for node in nodes] != [list(order[n * each : (n + 1) * each]) for n in range(num_nodes)]:
            continue
        peaks = []
        for node in nodes:
            node_load = groups[node].reshape(1, -1)
            plan = em.plan(node_load, num_ranks=num_ranks // num_nodes, num_slots=num_slots // num_nodes)
            peaks.append(even_rank_loads(node_load, plan).max())
        best = min(best, max(peaks))
    return best


def test_readme_vector_is_optimal() -> None:
    # Published plan: busiest ranks of 151 and 187 tokens. Six experts, eight slots and four ranks a node are within
    # the exhaustive search, so the bound is the optimum.
    placement = em.plan(README, num_ranks=8, num_slots=16, num_nodes=2, num_groups=4)
    check_groups(placement, 2, 4)
    par = em.peak_to_average(README, placement)
    bound = em.lower_bound(README, num_ranks=8, num_slots=16, num_nodes=2, num_groups=4)
    np.testing.assert_allclose(par, bound, rtol=2 * SAME)
    np.testing.assert_allclose(even_rank_loads(README, placement).max(axis=1), [151.0, 179.5])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(2, 2, 1, 2), (2, 4, 3, 4), (2, 4, 2, 2), (3, 3, 2, 6), (4, 4, 1, 8), (3, 6, 2, 3)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["spread", "ties"]),
)
def test_no_packing_is_better(counts: tuple[int, int, int, int], seed: int, kind: str) -> None:
    num_nodes, num_groups, size, num_ranks = counts
    num_ranks *= 1 if num_ranks % num_nodes == 0 else num_nodes
    random = np.random.default_rng(seed)
    shape = (1, num_groups * size)
    load = random.lognormal(3, 1, shape) if kind == "spread" else random.integers(0, 4, shape).astype(float)
    width = -(-num_groups * size // num_ranks) + 1
    options = {"num_ranks": num_ranks, "num_slots": num_ranks * width, "num_nodes": num_nodes, "num_groups": num_groups}
    placement = em.plan(load, **options)
    check_groups(placement, num_nodes, num_groups)
    peak = even_rank_loads(load, placement).max()
    assert peak == pytest.approx(best_by_hand(load[0], num_ranks, num_ranks * width, num_nodes, num_groups), rel=SAME)
    mean = load.sum() / num_ranks
    assert em.lower_bound(load, **options)[0] * mean <= peak * (1 + SAME)


def test_deepseek_v3_shape_reaches_the_bound() -> None:
    # Published: 1.409 where the bound is 1.310; the groups are packed heaviest first, one of 105 ways.
    random = np.random.default_rng(3)
    weight = random.permuted(np.tile(1.0 / np.arange(1, 257), (12, 1)), axis=1) * random.lognormal(0, 0.1, (12, 256))
    load = random.poisson(weight / weight.sum(axis=1, keepdims=True) * 200_000).astype(float)
    options = {"num_ranks": 32, "num_slots": 288, "num_nodes": 4, "num_groups": 8}
    placement = em.plan(load, **options)
    check_groups(placement, 4, 8)
    assert np.mean(em.peak_to_average(load, placement) / em.lower_bound(load, **options)) <= 1.001


def test_windows_are_packed_by_their_mean() -> None:
    load = np.random.default_rng(1).lognormal(3, 1, (6, 2, 32))
    placement = em.plan(load, num_ranks=8, num_slots=40, num_nodes=2, num_groups=4)
    check_groups(placement, 2, 4)


def test_more_packings_than_can_be_tried() -> None:
    # 16 groups on 8 nodes: 2,027,025 packings. Twice as much load in one group as in all others together bounds it.
    assert count_packings(16, 8) > 20_000
    load = np.random.default_rng(2).lognormal(3, 0.5, (2, 32))
    options = {"num_ranks": 16, "num_slots": 48, "num_nodes": 8, "num_groups": 16}
    placement = em.plan(load, **options)
    check_groups(placement, 8, 16)
    assert (em.peak_to_average(load, placement) >= em.lower_bound(load, **options)).all()
    load[:, 6:8] = load.sum(axis=1, keepdims=True)
    par = em.peak_to_average(load, em.plan(load, **options))
    np.testing.assert_allclose(par, em.lower_bound(load, **options), rtol=0.02)


@pytest.mark.parametrize(("num_nodes", "num_groups"), [(1, 4), (4, 1), (1, 1)])
def test_one_group_or_one_node_is_the_global_problem(num_nodes: int, num_groups: int) -> None:
    load = np.random.default_rng(5).lognormal(3, 1, (2, 32))
    plain = em.plan(load, num_ranks=8, num_slots=40)
    assert em.plan(load, num_ranks=8, num_slots=40, num_nodes=num_nodes, num_groups=num_groups) == plain


def test_all_packings_are_all_and_once() -> None:
    for num_groups, num_nodes in [(4, 1), (4, 2), (6, 3), (8, 4), (5, 5)]:
        sets, packings = all_packings(num_groups, num_nodes)
        assert len({tuple(map(tuple, sets[p])) for p in packings}) == len(packings)
        assert len(packings) == count_packings(num_groups, num_nodes)
        assert (np.sort(sets[packings].reshape(len(packings), -1)) == np.arange(num_groups)).all()


def test_best_packing_by_lazy_evaluation_is_the_best_of_all() -> None:
    random = np.random.default_rng(7)
    for _ in range(50):
        _, packings = all_packings(6, 3)
        floors = random.integers(0, 9, (2, 15)).astype(float)
        truth = floors + random.integers(0, 4, floors.shape)
        asked = floors.copy()
        chosen = best_packings(asked, packings, lambda layers, sets, _, truth=truth: truth[layers, sets])
        best = truth[np.arange(2)[:, None, None], packings[None]].max(axis=2).min(axis=1)
        assert (truth[np.arange(2)[:, None], packings[chosen]].max(axis=1) == best).all()


def test_even_packing_swaps_what_the_heaviest_first_leaves() -> None:
    # Heaviest first gives {8, 5, 4} and {7, 6, 1}, 17 and 14; {8, 6, 1} and {7, 5, 4} are 15 and 16.
    packing = even_packing(np.array([8.0, 7, 6, 5, 4, 1]), 2)
    assert sorted(np.array([8.0, 7, 6, 5, 4, 1])[packing].sum(axis=1)) == [15, 16]
