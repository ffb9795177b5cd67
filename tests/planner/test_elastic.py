"""Plans for uneven ranks and changed worlds: brute force where all can be tried, the plan's promises elsewhere."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from evenmoe.planner.elastic import start_from
from evenmoe.planner.options import PlanOptions
from evenmoe.planner.plan import plan_with


def rows_of(placement: Placement, layer: int) -> list[list[int]]:
    ends = np.cumsum(placement.rank_sizes)
    row = placement.slot_to_expert[layer]
    return [row[end - size : end].tolist() for end, size in zip(ends, placement.rank_sizes, strict=True)]


def check_promises(placement: Placement, sizes: list[int]) -> None:
    """Slots as asked for, every expert somewhere, and none twice on a rank that has no more slots than experts."""
    assert list(placement.rank_sizes) == sizes
    for layer in range(placement.num_layers):
        assert set(placement.slot_to_expert[layer].tolist()) == set(range(placement.num_experts))
        for row in rows_of(placement, layer):
            assert len(set(row)) == min(len(row), placement.num_experts)


def least_peak(load: np.ndarray, sizes: list[int]) -> float:
    """The smallest peak-to-average load of all placements without two replicas of an expert on a rank."""
    best = np.inf
    used = [size for size in sizes if size]
    for rows in product(*(combinations(range(len(load)), size) for size in used)):
        counts = np.bincount(np.concatenate(rows), minlength=len(load))
        if counts.min() > 0:
            best = min(best, max(sum(load[e] / counts[e] for e in row) for row in rows))
    return best / (load.sum() / len(used))


@st.composite
def worlds(draw: st.DrawFn, most_ranks: int = 4, most_experts: int = 5) -> tuple[int, list[int]]:
    experts = draw(st.integers(1, most_experts))
    fits = st.lists(st.integers(0, experts), min_size=1, max_size=most_ranks).filter(
        lambda sizes: sum(sizes) >= experts
    )
    return experts, draw(fits)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(0, 999))
def test_near_the_optimum_of_all_placements(world, seed):
    """The search is local: never below what all placements reach, and within a tenth of it on these tiny worlds."""
    experts, sizes = world
    load = np.random.default_rng(seed).integers(1, 50, (1, experts)).astype(float)
    placement = em.plan(load, num_ranks=len(sizes), num_slots=sizes)
    check_promises(placement, sizes)
    par, best = em.peak_to_average(load, placement)[0], least_peak(load[0], sizes)
    bound = em.lower_bound(load, num_ranks=len(sizes), num_slots=sizes)[0]
    assert bound * (1 - 1e-12) <= best * (1 - 1e-12) <= par <= best * 1.1


@settings(max_examples=40, deadline=None)
@given(worlds(most_ranks=9, most_experts=24), st.integers(0, 999), st.booleans())
def test_promises_on_larger_worlds(world, seed, windows):
    experts, sizes = world
    load = np.random.default_rng(seed).gamma(0.5, 100, (3, 2, experts) if windows else (2, experts))
    check_promises(em.plan(load, num_ranks=len(sizes), num_slots=sizes), sizes)


def test_sizes_that_are_equal_are_the_plan_for_their_sum():
    load = np.random.default_rng(0).gamma(1, 100, (2, 16))
    even = em.plan(load, num_ranks=4, num_slots=24)
    assert em.plan(load, num_ranks=4, num_slots=[6] * 4) == even
    assert em.plan(load, num_ranks=4, num_slots=(6,) * 4, rule="batch", num_nodes=2, num_groups=4).is_even
    sizes = [6, 0, 6, 6, 6, 0]
    among = em.plan(load, num_ranks=6, num_slots=36, dead_ranks={1, 5})
    assert list(among.rank_sizes) == sizes
    assert among.slot_to_expert.tolist() == even.slot_to_expert.tolist()


def test_a_rank_with_more_slots_than_experts_repeats_the_lightest():
    placement = em.plan([[6.0, 2.0]], num_ranks=2, num_slots=[4, 1])
    assert [sorted(row) for row in rows_of(placement, 0)] == [[0, 0, 1, 1], [0]]


def fewest_copies(before: list[set[int]], sizes: list[int], experts: int) -> int:
    """By trying every choice of kept experts: slots that are not kept are copies, and must take the rest."""
    best = sum(sizes)
    for rows in product(
        *(
            [kept for number in range(min(size, len(held)) + 1) for kept in combinations(sorted(held), number)]
            for held, size in zip(before, sizes, strict=True)
        )
    ):
        copies = sum(sizes) - sum(map(len, rows))
        if copies < best and experts - len(set().union(*rows)) <= copies:
            best = copies
    return best


@settings(max_examples=60, deadline=None)
@given(worlds(3, 4), st.data(), st.integers(0, 999))
def test_carried_over_by_the_fewest_copies(world, data, seed):
    experts, sizes = world
    _, old = data.draw(worlds(3, 4).filter(lambda other: sum(other[1]) >= experts))
    rng = np.random.default_rng(seed)
    slots = rng.permutation([*range(experts), *rng.integers(0, experts, sum(old) - experts)])
    previous = Placement([slots], len(old), num_experts=experts, rank_sizes=old)
    active = [rank for rank, size in enumerate(sizes) if size]
    before = [set(rows_of(previous, 0)[rank]) if rank < len(old) else set() for rank in active]
    used = [sizes[rank] for rank in active]
    (rows,) = start_from(previous, rng.random((1, experts)), active, used)
    assert [len(row) for row in rows] == used
    assert all(len(set(row)) == len(row) for row in rows)
    assert set().union(*rows) == set(range(experts))
    copies = sum(len(set(row) - held) for row, held in zip(rows, before, strict=True))
    assert copies == fewest_copies(before, used, experts)


@pytest.mark.parametrize(
    ("ranks", "slots", "dead"),
    [(10, 100, ()), (6, 72, ()), (8, 96, (3, 7)), (8, [13, 11] * 4, ()), (8, 80, (0,)), (9, 99, (8,))],
)
@pytest.mark.parametrize("windows", [1, 4])
def test_from_a_placement_of_another_world(ranks, slots, dead, windows):
    """More copies never give a worse plan; the fewest are few; what stays on its rank stays in its slot."""
    rng = np.random.default_rng(1)
    load = rng.gamma(1, 100, (windows, 2, 64))
    previous = em.plan(load, num_ranks=8, num_slots=96)
    drifted = load * rng.lognormal(0, 0.2, load.shape)
    call = {"num_ranks": ranks, "num_slots": slots, "previous": previous, "dead_ranks": dead}
    forced = 0
    if slots != 99:  # where only slots are lost, nothing need be copied
        with pytest.raises(ConstraintError, match="needs on this world to begin with") as caught:
            em.plan(drifted, **call, max_copies=0)
        forced = int(caught.value.rule.split()[4].rstrip(","))
    peaks = []
    for extra in (0, 4, 12, 40):
        placement = em.plan(drifted, **call, max_copies=forced + extra)
        sizes = [0 if rank in dead else size for rank, size in enumerate(np.resize(slots, ranks).tolist())]
        if not isinstance(slots, list):
            sizes = [0 if rank in dead else slots // ranks for rank in range(ranks)]
        check_promises(placement, sizes)
        assert em.count_copies(previous, placement).max() <= forced + extra
        peaks.append(em.peak_to_average(drifted, placement).mean(axis=0))
    assert (np.diff(peaks, axis=0) <= 1e-9).all()
    free = em.plan(drifted, **call)
    check_promises(free, sizes)
    anew = em.plan(drifted, num_ranks=ranks, num_slots=slots, dead_ranks=dead)
    assert em.count_copies(previous, free).sum() < em.count_copies(previous, anew).sum()


def test_windows_without_tokens_in_a_layer_say_nothing_about_it():
    """On another world, too, such a layer is planned as if these windows were not there."""
    rng = np.random.default_rng(4)
    load = rng.gamma(0.5, 100, (8, 2, 32))
    load[:6, 1] = 0
    previous = em.plan(rng.gamma(0.5, 100, (2, 32)), num_ranks=8, num_slots=40)
    call = {"num_ranks": 8, "num_slots": 40, "dead_ranks": [3]}
    both = em.plan(load, **call, previous=previous)
    alone = em.plan(load[6:, 1:], **call, previous=Placement(previous.slot_to_expert[1:], 8))
    assert both.slot_to_expert[1].tolist() == alone.slot_to_expert[0].tolist()


REFUSED = {
    "too few of them": (
        {"num_slots": [2, 2, 2]},
        "`num_slots` is [2 x3]: it must be one number, or one for each of the 2 ranks; give the slots of every rank.",
    ),
    "too few slots": (
        {"num_slots": [2, 1]},
        "`num_slots` is [2, 1], 3 together: it must hold each of the 4 experts at least once; "
        "give 1 slots more, or keep more ranks.",
    ),
    "negative": ({"num_slots": [5, -1]}, "`num_slots` is -1: it must be at least 0; use 0 or more."),
    "no number": (
        {"num_slots": [5, 1.5]},
        "`num_slots` is 1.5 of type float: it must be a whole number; pass an int.",
    ),
    "no such rank": (
        {"num_slots": 8, "dead_ranks": [2]},
        "`dead_ranks` is 2: it must be a rank, 0 to 1; leave it out.",
    ),
    "a rule that shares unevenly": (
        {"num_slots": [4, 1], "rule": "batch"},
        "`num_slots` is [4, 1] with rule='batch': it must be one number for all ranks, none of them dead, to plan "
        "for a rule whose shares are not even; give one number, or plan for the even rule.",
    ),
    "groups inside nodes": (
        {"num_slots": [4, 1], "num_nodes": 2, "num_groups": 2},
        "`num_slots` is [4, 1] with 2 groups on 2 nodes: it must be one number for all ranks, none of them dead, to "
        "keep groups inside nodes; plan across nodes with num_groups=1.",
    ),
    "all dead": (
        {"num_slots": 4, "dead_ranks": [0, 1]},
        "`num_slots` is [0 x2], 0 together: it must hold each of the 4 experts at least once; "
        "give 4 slots more, or keep more ranks.",
    ),
    "a previous one of another world for the rank rule": (
        {"num_slots": 4, "rule": "rank", "previous": Placement([[0, 1, 2, 3]], 4)},
        "`previous` is a placement of 4 ranks, 1 x4 slots: it must be of the same ranks and slots to plan for a rule "
        "whose shares are not even; plan anew without previous.",
    ),
    "a previous one of another model": (
        {"num_slots": 4, "previous": Placement([[0, 1, 2]], 1)},
        "`previous` is a placement of 1 layers, 3 experts: it must have the 1 layers, 4 experts of this call; "
        "pass the placement in use of the same model, or None to plan anew.",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_planned(mistake):
    options, text = REFUSED[mistake]
    with pytest.raises(ConstraintError) as caught:
        em.plan([[4.0, 3.0, 2.0, 1.0]], num_ranks=2, **options)
    assert str(caught.value) == text


def test_other_planners_are_told():
    load = [[4.0, 3.0, 2.0, 1.0]]
    with pytest.raises(ConstraintError, match="must be one number for all ranks, none of them dead, for the greedy"):
        plan_with("greedy", load, PlanOptions(2, [3, 2]))
    assert plan_with("evenmoe", load, PlanOptions(3, 6, dead_ranks=[2])).rank_sizes == (2, 2, 0)
