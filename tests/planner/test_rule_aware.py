"""Plans for the `rank` rule, against every placement of tiny cases and against the rule's own arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.metrics import peak_over_mean
from evenmoe.planner.kernels import rank_rule
from evenmoe.rules import RULES, rank


def par(load, placement):
    return peak_over_mean(RULES.get("rank").rank_loads(load, placement))


def zipf(num_layers, num_experts, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(1e5 / np.arange(1, num_experts + 1)) for _ in range(num_layers)])


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks", "most"),
    [(256, 264, 8, 1.005), (256, 288, 32, 1.01), (128, 144, 16, 1.01), (256, 320, 32, 1.01), (64, 512, 64, 1.03)],
)
def test_even_by_rank_and_every_replica_chosen(num_experts, num_slots, num_ranks, most):
    load = zipf(3, num_experts, num_slots)
    placement = em.plan(load, num_ranks=num_ranks, num_slots=num_slots, rule="rank")
    assert par(load, placement).mean() <= most
    assert (rank.reachable(placement.num_replicas, num_ranks) == placement.num_replicas).all()
    unaware = em.plan(load, num_ranks=num_ranks, num_slots=num_slots)
    assert (par(load, unaware) > par(load, placement) + 0.02).all()


def every_placement(num_experts, num_slots, num_ranks):
    for slots in itertools.product(range(num_experts), repeat=num_slots):
        if len(set(slots)) < num_experts:
            continue
        held = np.array(slots).reshape(num_ranks, -1)
        if (np.sort(held, axis=1) != held).any():
            continue  # order within a rank is not a different plan
        where = [np.flatnonzero(np.array(slots) == expert) for expert in range(num_experts)]
        for orders in itertools.product(*(itertools.permutations(range(len(mine))) for mine in where)):
            index = np.empty(num_slots, int)
            for mine, order in zip(where, orders, strict=True):
                index[mine] = order
            yield em.Placement([slots], num_ranks, replica_index=[index])


@pytest.mark.parametrize(("num_experts", "num_slots", "num_ranks"), [(3, 4, 2), (3, 6, 3), (4, 5, 5)])
def test_tiny_cases_are_near_the_best_of_all(num_experts, num_slots, num_ranks):
    load = np.random.default_rng(0).lognormal(0, 1, (12, num_experts))
    placements = list(every_placement(num_experts, num_slots, num_ranks))
    best = [min(par(layer[None], p)[0] for p in placements) for layer in load]
    planned = par(load, em.plan(load, num_ranks=num_ranks, num_slots=num_slots, rule="rank"))
    assert (planned >= np.array(best) - 1e-12).all()
    # A local search from six sets of counts: with so few slots no single step may lead to the best. Measured: means
    # of 1.015, 1.024 and 1.000 over these twelve loads, 1.09 at worst.
    assert (planned / best).mean() <= 1.03
    assert (planned / best).max() <= 1.1


def idle(counts, num_ranks):
    """Replicas that no rank chooses."""
    return (counts - rank.reachable(counts, num_ranks)).sum()


def next_step(counts, num_ranks):
    """The fewest replicas more that would lower the shares of some expert."""
    reached = [c for c in rank.reachable(counts, num_ranks).tolist() if c < num_ranks]
    return min((-(-num_ranks // (-(-num_ranks // c) - 1)) - c for c in reached), default=10**9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_any_shape_gives_a_placement(num_ranks, width, data):
    num_experts = data.draw(st.integers(1, num_ranks * width))
    load = np.random.default_rng(data.draw(st.integers(0, 1000))).pareto(1, (2, num_experts)).clip(0, 1e4)
    load[0, : data.draw(st.integers(0, num_experts))] = 0
    placement = em.plan(load, num_ranks=num_ranks, num_slots=num_ranks * width, rule="rank")
    held = placement.slot_to_expert.reshape(2, num_ranks, width)
    if width < num_experts:
        assert all(len(set(ranks.tolist())) == width for layer in held for ranks in layer)  # no expert twice on a rank
    else:
        assert par(load, placement).tolist() == pytest.approx([1.0, 1.0])
    # Slots must be filled, but with replicas that nobody chooses only when they are too few for anybody's next count
    # that lowers a share: the counts start so, and every later move keeps it so.
    if width < num_experts:
        for counts in placement.num_replicas:
            assert idle(counts, num_ranks) == 0 or idle(counts, num_ranks) < next_step(counts, num_ranks)


def test_no_move_leaves_a_replica_idle_that_somebody_could_use():
    # The search once took one of an expert's five replicas away, and then no rank chose the fourth.
    load = np.random.default_rng(223).pareto(1, (2, 8)).clip(0, 1e4)
    placement = em.plan(load, num_ranks=5, num_slots=25, rule="rank")
    assert [idle(counts, 5) for counts in placement.num_replicas] == [0, 0]
    counts = np.array([5, 4, 1])  # of 5 ranks' counts 1, 2, 3, 5: the fourth replica is idle, expert 2 could use it
    assert rank_rule.wasted(counts, 5, 5) == (1, 1)
    assert rank_rule.wasted(np.array([5, 4]), 5, 5) == (1, 2)


def test_slots_that_nobody_can_use_are_filled():
    # 9 ranks reach 1, 2, 3, 5 and 9 replicas: of 9 slots the two experts use 5 + 3, and one is left over.
    placement = em.plan([[5.0, 3.0]], num_ranks=9, num_slots=9, rule="rank")
    assert sorted(rank.reachable(placement.num_replicas[0], 9).tolist()) == [3, 5]
    assert placement.num_replicas.sum() == 9


def test_counts_are_reachable_and_go_to_the_heaviest():
    assert rank_rule.count_reachable(np.array([9.0, 1.0, 1.0]), 6, 8, 8).tolist() == [4, 1, 1]
    assert rank_rule.count_reachable(np.array([9.0, 1.0, 1.0]), 10, 8, 8).tolist() == [8, 1, 1]
    assert rank_rule.count_reachable(np.array([9.0, 1.0, 0.9]), 8, 8, 8).tolist() == [4, 2, 2]


@pytest.mark.parametrize("count", range(1, 13))
def test_share_is_the_rules(count):
    mine = [rank_rule.share_of(count, replica, 12) for replica in range(count)]
    assert mine == (rank.ranks_choosing(count, np.arange(count), 12) / 12).tolist()


def test_the_smaller_share_goes_where_it_helps():
    # Eight ranks with three slots: expert 0 has three replicas with 3, 3 and 2 eighths, the rest is even but for one.
    load = np.full((1, 22), 8.0)
    load[0, 0] = 24.0
    placement = em.plan(load, num_ranks=8, num_slots=24, rule="rank")
    assert par(load, placement)[0] <= 1.06
    flipped = em.Placement(
        placement.slot_to_expert,
        8,
        replica_index=np.where(
            placement.slot_to_expert == 0, placement.num_replicas[0, 0] - 1 - placement.replica_index, 0
        )
        + np.where(placement.slot_to_expert == 0, 0, placement.replica_index),
    )
    assert par(load, placement)[0] <= par(load, flipped)[0]


@pytest.mark.parametrize("max_copies", [0, 1, 6, None])
def test_copies_stay_within_the_budget_and_pay(max_copies):
    rng = np.random.default_rng(3)
    before = zipf(3, 64, 3)
    previous = em.plan(before, num_ranks=8, num_slots=72, rule="rank")
    after = before * rng.lognormal(0, 0.4, before.shape)
    placement = em.plan(after, num_ranks=8, num_slots=72, rule="rank", previous=previous, max_copies=max_copies)
    copies = em.count_copies(previous, placement)
    gain = par(after, previous) - par(after, placement)
    assert (gain >= 5e-4 * copies - 0.01).all()  # 0.01 bounds what the squares of the goal can outweigh
    assert (gain >= 0 if max_copies == 0 else gain > 0.01).all()
    if max_copies is not None:
        assert (copies <= max_copies).all()


def test_a_placement_with_duplicates_on_a_rank_is_a_start():
    previous = em.Placement([[0, 0, 1, 2, 3, 4]], 3)
    load = [[40.0, 10.0, 10.0, 10.0, 10.0]]
    placement = em.plan(load, num_ranks=3, num_slots=6, rule="rank", previous=previous)
    assert par(load, placement)[0] < par(load, previous)[0]


def test_windows():
    rng = np.random.default_rng(1)
    windows = zipf(2, 64, 1) * rng.lognormal(0, 0.4, (8, 2, 64))
    from_windows = em.plan(windows, num_ranks=8, num_slots=72, rule="rank")
    from_mean = em.plan(windows.mean(0), num_ranks=8, num_slots=72, rule="rank")
    assert par(windows, from_windows).mean() < par(windows, from_mean).mean() - 0.02
    idle = np.concatenate([np.zeros((1, 2, 64)), windows])
    assert em.plan(idle, num_ranks=8, num_slots=72, rule="rank") == from_windows


@pytest.mark.parametrize("rule", ["even", "token", "occurrence"])
def test_rules_with_even_shares_are_planned_as_even(rule):
    load = zipf(2, 32, 0)
    even = em.plan(load, num_ranks=4, num_slots=40)
    assert em.plan(load, num_ranks=4, num_slots=40, rule=rule) == even


@pytest.mark.parametrize("rule", ["rank", "batch"])
def test_from_a_placement_that_is_far_off_a_new_plan_is_as_good_as_ever(rule: str) -> None:
    """Experts in the order of their load, so that the first rank has nearly all: no walk of small moves gets away."""
    load = np.tile(1000.0 / np.arange(1, 65), (2, 1))
    used = em.Placement(np.tile(np.arange(72) % 64, (2, 1)), num_ranks=8)
    shape = {"num_ranks": 8, "num_slots": 72, "rule": rule}
    plans = em.plan(load, **shape), em.plan(load, **shape, previous=used)
    new, again = (RULES.get(rule).rank_loads(load, plan).max(axis=1) for plan in plans)
    assert again.tolist() == pytest.approx(new.tolist(), rel=1e-9)  # rounding of sums in another order
    few = em.plan(load, **shape, previous=used, max_copies=4)
    assert em.count_copies(used, few).max() <= 4
