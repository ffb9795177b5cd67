"""Plans for the `batch` rule: held-out peaks after the best split, copy budgets, and the search's own claims."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.metrics import peak_over_mean
from evenmoe.planner.batch import drift_factors, scenarios_of
from evenmoe.planner.kernels.batch import evaluate, first_better
from evenmoe.planner.kernels.batch_moves import candidates
from evenmoe.planner.kernels.packing import draft, replicate
from evenmoe.rules import RULES
from tests.effort import effort


def zipf(num_layers, num_experts, seed):
    """Tokens of a layer: permuted 1 / rank times lognormal(0.1), 200,000 expected, Poisson."""
    rng = np.random.default_rng(seed)
    weights = np.stack([rng.permutation(1.0 / np.arange(1, num_experts + 1)) for _ in range(num_layers)])
    weights *= rng.lognormal(0, 0.1, weights.shape)
    return rng.poisson(weights / weights.sum(axis=1, keepdims=True) * 200_000).astype(float)


def drifted(load, drift, count, seed):
    moved = load * np.random.default_rng(seed).lognormal(0, drift, (count, *load.shape))
    return moved * (load.sum(axis=-1) / moved.sum(axis=-1))[..., None]


def held_out(load, placement, drift=0.3, count=40):
    """Mean peak-to-average load after the best split of loads that the planner has not seen."""
    loads = RULES.get("batch").rank_loads(drifted(load, drift, count, seed=12345), placement)
    return peak_over_mean(loads).mean()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("num_slots", "num_ranks", "most"), [(264, 8, 1.02), (288, 32, 1.13)])
def test_drifted_batches_come_out_even(num_slots, num_ranks, most, seed):
    load = zipf(3, 256, seed)
    placement = em.plan(load, num_ranks=num_ranks, num_slots=num_slots, rule="batch")
    assert held_out(load, placement) <= most
    if num_ranks == 32:  # a plan for the even split is no substitute: 1.15 to 1.20 here
        assert held_out(load, em.plan(load, num_ranks=num_ranks, num_slots=num_slots)) > most
    assert held_out(load, placement, drift=1e-6, count=1) <= 1.005


def test_a_layer_takes_milliseconds():
    load = zipf(4, 256, 0)
    em.plan(load[:1], num_ranks=32, num_slots=288, rule="batch")
    # 7.5 where this was written (10 ms a layer), busy or idle; the bound is far below what a slower method takes.
    assert effort(lambda: em.plan(load, num_ranks=32, num_slots=288, rule="batch")) < 60


def test_same_arguments_same_plan():
    load = zipf(2, 32, 3)
    arguments = {"num_ranks": 4, "num_slots": 40, "rule": "batch"}
    assert em.plan(load, **arguments) == em.plan(load.copy(), **arguments)
    assert em.plan(load, **arguments, seed=1) == em.plan(load, **arguments, seed=1)


def test_windows_are_the_loads_to_serve():
    """Two groups of experts that are hot in turn: a plan for their mean cannot know that they move together."""
    rng = np.random.default_rng(0)
    base = zipf(2, 64, 5)
    group = np.arange(64) < 32
    swing = rng.lognormal(0, 0.8, (24, 1, 1))
    windows = base * np.where(group, swing, 1 / swing) * rng.lognormal(0, 0.2, (24, 2, 64))
    train, test = windows[:16], windows[16:]
    par = {
        name: peak_over_mean(
            RULES.get("batch").rank_loads(test, em.plan(load, num_ranks=8, num_slots=72, rule="batch"))
        ).mean()
        for name, load in (("windows", train), ("mean", train.mean(0)))
    }
    assert par["windows"] < par["mean"]


@pytest.mark.parametrize("max_copies", [0, 1, 7, None])
def test_copies_stay_within_the_budget_and_pay(max_copies):
    before = zipf(3, 128, 7)
    previous = em.plan(before, num_ranks=16, num_slots=144, rule="batch")
    after = drifted(before, 0.6, 1, 3)[0]
    placement = em.plan(after, num_ranks=16, num_slots=144, rule="batch", previous=previous, max_copies=max_copies)
    copies = em.count_copies(previous, placement)
    if max_copies is not None:
        assert (copies <= max_copies).all()
    if max_copies == 0:
        assert placement == previous
    else:
        gain = held_out(after, previous) - held_out(after, placement)
        assert gain > 0.002 * copies.mean() > 0  # what a copy must promise, kept on unseen drift
    width = placement.slots_per_rank
    for layer in range(3):
        for slot, expert in enumerate(placement.slot_to_expert[layer]):
            stays = previous.slot_to_expert[layer, slot // width * width :][:width]
            if expert in stays:
                assert previous.slot_to_expert[layer, slot] == expert  # what stays on its rank stays in its slot


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_any_shape_gives_a_placement(num_ranks, width, data):
    num_experts = data.draw(st.integers(1, num_ranks * width))
    seed = data.draw(st.integers(0, 1000))
    load = np.random.default_rng(seed).pareto(1, (2, num_experts)).clip(0, 1e4)
    load[0, : data.draw(st.integers(0, num_experts))] = 0
    placement = em.plan(load, num_ranks=num_ranks, num_slots=num_ranks * width, rule="batch")
    assert (placement.num_replicas >= 1).all()
    if num_ranks * width < num_ranks * num_experts:
        held = placement.slot_to_expert.reshape(2, num_ranks, width)
        assert all(len(set(rank.tolist())) == width for layer in held for rank in layer)  # no expert twice on a rank
    even = em.plan(load, num_ranks=num_ranks, num_slots=num_ranks * width)
    # Under the loads planned for, the even plan is one of the drafts, but drift decides between them.
    assert held_out(load + 1, placement) <= held_out(load + 1, even) * 1.15


def test_nothing_to_choose():
    load = np.arange(8.0)[None]
    for ranks, slots in ((1, 8), (1, 11), (4, 8), (2, 16), (2, 20)):
        placement = em.plan(load, num_ranks=ranks, num_slots=slots, rule="batch")
        assert (placement.num_ranks, placement.num_slots) == (ranks, slots)
    idle = em.plan(np.zeros((1, 8)), num_ranks=4, num_slots=12, rule="batch")
    assert (idle.num_replicas >= 1).all()
    windows = np.stack([np.zeros((1, 8)), load])  # an idle window says nothing
    assert em.plan(windows, num_ranks=4, num_slots=12, rule="batch") == em.plan(
        load, num_ranks=4, num_slots=12, rule="batch"
    )


@st.composite
def searches(draw):
    """A rank-by-slot layer, perhaps with an expert twice on a rank, and scenarios."""
    num_ranks, width = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    num_experts = draw(st.integers(width, num_ranks * width))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    more = rng.integers(0, num_experts, num_ranks * width - num_experts)
    held = rng.permutation(np.r_[np.arange(num_experts), more]).reshape(num_ranks, width)
    tokens = rng.pareto(1.5, (5, num_experts)) * (rng.random((5, num_experts)) < 0.8) + 1e-6
    return held, np.ascontiguousarray(tokens * num_ranks / tokens.sum(1, keepdims=True)), rng


def peaks_of(held, scenarios, limit):
    return evaluate(held, scenarios, np.ones(len(scenarios)), np.arange(len(scenarios)), limit)


@settings(max_examples=150, deadline=None)
@given(searches())
def test_the_order_of_scenarios_changes_nothing(case):
    held, scenarios, rng = case
    number = len(scenarios)
    total, peaks, closed, load = peaks_of(held, scenarios, np.inf)
    for limit in (np.inf, total + 1e-9, total - 1e-9, total - 2e-3, number):  # of equal sums the last bit decides
        floors, order = 1 + rng.random(number) * (peaks - 1), rng.permutation(number)
        found = evaluate(held, scenarios, floors, order, limit)
        assert found[0] == (total if total <= limit else np.inf)
        if total <= limit:
            for one, other in zip(found[1:], (peaks, closed, load), strict=True):
                np.testing.assert_array_equal(one, other)


@settings(max_examples=150, deadline=None)
@given(searches())
def test_peaks_are_those_of_the_exact_split(case):
    held, scenarios, _ = case
    num_ranks = len(held)
    total, peaks, closed, load = peaks_of(held, scenarios, np.inf)
    placement = em.Placement(held.reshape(1, -1), num_ranks, num_experts=scenarios.shape[1])
    exact = RULES.get("batch").rank_loads(scenarios[:, None], placement)[:, 0].max(-1)
    # A peak is accepted once its set of ranks is within 2e-4 of it; nothing is below the exact one but rounding.
    assert (peaks <= np.maximum(exact, 1) + 2.1e-4).all()
    assert (peaks >= exact - 1e-9).all()
    assert total == pytest.approx(peaks.sum())
    np.testing.assert_allclose(load.sum(1), num_ranks)
    mean_of_closed = (load * closed).sum(1) / closed.sum(1)
    assert (mean_of_closed <= exact + 1e-9).all()  # the proof that the peak cannot be lower
    assert peaks_of(held, scenarios, total - 1e-9)[0] == np.inf


@settings(max_examples=100, deadline=None)
@given(searches())
def test_no_move_that_helps_is_screened_out(case):
    """Bounds of moves are bounds: if a move lowers the sum of the peaks, `candidates` has to list it."""
    held, scenarios, rng = case
    num_ranks, width = held.shape
    num_experts = scenarios.shape[1]
    if any(len(set(rank.tolist())) < width for rank in held):
        return  # with duplicates the screen is a guess, and only `evaluate` decides
    total, _, closed, load = peaks_of(held, scenarios, np.inf)
    hot = int(rng.integers(num_ranks))
    moves = np.empty((1000, 5), np.int64)
    floors = np.empty((1000, len(scenarios)))
    kept = np.ones((num_ranks, num_experts), bool)
    found = candidates(
        held, np.ascontiguousarray(scenarios.T), closed, load, kept, hot, num_ranks, 0, 0.0, total, moves, floors
    )
    listed = {tuple(move[:4]) for move in moves[:found].tolist()}
    for floor, (mine, rank, theirs, keeps, _) in zip(floors, moves[: min(found, 8)].tolist(), strict=False):
        trial = held.copy()
        trial[rank, theirs] = held[hot, mine]
        if not keeps:
            trial[hot, mine] = held[rank, theirs]
        assert (peaks_of(trial, scenarios, np.inf)[1] >= floor - 1e-9).all()
    for mine in range(width):
        for rank in set(range(num_ranks)) - {hot}:
            for theirs in range(width):
                a, b = held[hot, mine], held[rank, theirs]
                for keeps in (0, 1):
                    if a in held[rank] or (not keeps and b in held[hot]) or (keeps and (held == b).sum() == 1):
                        continue
                    trial = held.copy()
                    trial[rank, theirs] = a
                    if not keeps:
                        trial[hot, mine] = b
                    if peaks_of(trial, scenarios, np.inf)[0] < total - 5 * 2.1e-4:
                        assert (mine, rank, theirs, keeps) in listed


@settings(max_examples=100, deadline=None)
@given(searches())
def test_the_first_move_that_is_good_enough_is_made(case):
    held, scenarios, rng = case
    num_ranks, width = held.shape
    _, peaks, _, _ = peaks_of(held, scenarios, np.inf)
    number = int(rng.integers(1, 6))
    moves = np.stack([rng.integers(0, most, number) for most in (width, num_ranks, width, 2, 3)], axis=1)
    floors = 1 - 0.1 * rng.random((number, len(peaks)))
    hot, price = int(rng.integers(num_ranks)), float(rng.choice([0.0, 0.01]))
    limit = float(peaks.sum() * rng.choice([0.5, 0.99, 1.0, 2.0]))
    expected = number, None, np.inf
    for tried, (mine, rank, theirs, keeps, cost) in enumerate(moves.tolist(), 1):
        trial = held.copy()
        trial[rank, theirs] = held[hot, mine]
        if not keeps:
            trial[hot, mine] = held[rank, theirs]
        order = np.argsort(floors[tried - 1] - peaks, kind="stable")
        total = evaluate(trial, scenarios, floors[tried - 1], order, limit - price * max(cost, 0))[0]
        if total < np.inf:
            expected = tried, trial, total
            break
    found = first_better(held, hot, moves, floors, scenarios, peaks, limit, price)
    assert (found[0], found[2]) == (expected[0], expected[2])
    if expected[1] is not None:
        np.testing.assert_array_equal(found[1], expected[1])
        for one, other in zip(found[3:], peaks_of(found[1], scenarios, np.inf)[1:], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_draft_links_all_ranks():
    load = np.sort(zipf(1, 64, 2)[0])[::-1] * (8 / 200_000)
    _, counts = replicate(load, 72, 8)
    held = np.empty((8, 9), np.int64)
    assert draft(load, 0.3 * load, np.arange(64), counts, np.zeros(8), 0.2, 1.0, held)
    assert np.bincount(held.reshape(-1), minlength=64).tolist() == counts.tolist()
    linked = {0}
    for _ in range(8):
        experts = {e for rank in linked for e in held[rank].tolist() if counts[e] > 1}
        linked |= {rank for rank in range(8) if experts & set(held[rank].tolist())}
    assert linked == set(range(8))


def test_replicas_go_where_they_lower_the_most():
    assert replicate(np.array([6.0, 2.0, 1.0]), 6, 3)[1].tolist() == [3, 2, 1]
    assert replicate(np.array([6.0, 2.0, 1.0]), 6, 6)[1].tolist() == [4, 1, 1]
    assert replicate(np.zeros(2), 4, 2)[1].tolist() == [2, 2]


def test_scenarios():
    factors = drift_factors(4, 3, seed=0, sizes=(0.5,))
    assert np.sort(factors, axis=0)[:, 0].tolist() == np.sort(factors, axis=0)[:, 1].tolist()  # the same quantiles
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-12)
    load = np.array([[1.0, 2.0, 3.0]])
    one = scenarios_of(load, 2, factors, factors)
    np.testing.assert_allclose(one, load * factors * 2 / (load * factors).sum(1, keepdims=True))
    windows = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    some = scenarios_of(windows, 2, factors, np.ones_like(factors))
    assert some.tolist() == [[1, 1, 0], [0, 1.5, 0.5], [1, 1, 0], [0, 1.5, 0.5]]
    many = scenarios_of(np.eye(3)[np.arange(30) % 3], 1, factors, factors)
    assert len(many) == 8  # 30 windows thinned to every fourth
