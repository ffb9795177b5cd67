"""The static plan: valid on every shape, near the bound where the published planners are not, the same every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.metrics import even_rank_loads
from evenmoe.planner.greedy import plan_greedy
from evenmoe.planner.kernels import swaps
from evenmoe.planner.kernels.refine import refine, restart
from evenmoe.planner.static import FAR, _least_replicas, plan_static
from evenmoe.traces.synthesis import synthesize

Load = npt.NDArray[np.float64]

# What the quick search stops at, plus the rounding of loads summed in different orders.
NEARLY = FAR + 1e-9


def zipf(layers: int, experts: int, exponent: float, seed: int) -> Load:
    """Permuted 1 / rank^s per layer times lognormal(0.1), 200,000 tokens, Poisson."""
    random = np.random.default_rng(seed)
    weight = random.permuted(np.tile(1 / np.arange(1, experts + 1) ** exponent, (layers, 1)), axis=1)
    weight *= random.lognormal(0, 0.1, weight.shape)
    return random.poisson(weight / weight.sum(axis=1, keepdims=True) * 200_000).astype(float)


def lognormal(layers: int, experts: int, sigma: float, seed: int) -> Load:
    random = np.random.default_rng(seed)
    weight = random.lognormal(0, sigma, (layers, experts))
    return random.poisson(weight / weight.sum(axis=1, keepdims=True) * 200_000).astype(float)


def duplicates(slots: npt.NDArray[np.int32], num_ranks: int) -> int:
    """Slots whose rank holds the same expert in an earlier slot."""
    held = np.sort(slots.reshape(len(slots), num_ranks, -1), axis=2)
    return int((held[:, :, 1:] == held[:, :, :-1]).sum())


def check(load: Load, num_ranks: int, num_slots: int) -> Load:
    """Plan, assert what always holds, and return the peak-to-average loads."""
    slots = plan_static(load, num_ranks, num_slots, seed=3)
    assert slots.dtype == np.int32
    assert slots.shape == (len(load), num_slots)
    assert slots.flags.c_contiguous
    placement = em.Placement(slots, num_ranks, num_experts=load.shape[1])  # every expert has a slot, ranks are equal
    if num_slots <= load.shape[1] * num_ranks:
        assert placement.num_replicas.max() <= num_ranks
        assert duplicates(slots, num_ranks) == 0
    par = em.peak_to_average(load, placement)
    bound = em.lower_bound(load, num_ranks=num_ranks, num_slots=num_slots)
    assert (par >= bound * (1 - 1e-12)).all()
    return par


@st.composite
def problems(draw: st.DrawFn) -> tuple[Load, int, int]:
    num_experts = draw(st.integers(1, 40))
    num_ranks = draw(st.integers(1, 20))
    least = -(-num_experts // num_ranks)
    width = draw(st.integers(least, least + draw(st.sampled_from([0, 1, 2, num_experts]))))
    kind = draw(st.sampled_from(["zero", "equal", "one hot", "few", "ties", "spread"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), num_experts)
    load = {
        "zero": np.zeros(shape),
        "equal": np.full(shape, 7.0),
        "one hot": np.eye(1, num_experts).repeat(shape[0], axis=0) * 1000,
        "few": random.poisson(0.3, shape).astype(float),
        "ties": random.integers(0, 4, shape).astype(float),
        "spread": random.lognormal(0, 1.5, shape),
    }[kind]
    return load, num_ranks, num_ranks * width


@settings(max_examples=200, deadline=None)
@given(problems())
def test_every_shape_gives_a_valid_plan(problem: tuple[Load, int, int]) -> None:
    check(*problem)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_slots"),
    [(1, 1, 1), (1, 5, 5), (5, 1, 5), (7, 1, 9), (6, 6, 6), (6, 3, 6), (8, 8, 56), (8, 8, 64), (3, 2, 10), (31, 8, 40)],
)
@pytest.mark.parametrize("kind", ["zero", "one", "all"])
def test_the_edges_of_the_shapes(num_experts: int, num_ranks: int, num_slots: int, kind: str) -> None:
    load = {"zero": np.zeros, "one": lambda shape: np.eye(*shape), "all": np.ones}[kind]((2, num_experts))
    check(load, num_ranks, num_slots)


def test_a_layer_without_load_spreads_its_replicas() -> None:
    # DeepSeek's planner gives every spare slot of such a layer to expert 0 (28 duplicate replicas on 32 ranks).
    placement = em.plan(np.zeros((1, 256)), num_ranks=32, num_slots=288)
    assert placement.num_replicas.max() == 2


@pytest.mark.parametrize("rest", ["equal", "lognormal"])
def test_one_expert_with_nine_tenths_of_the_load(rest: str) -> None:
    # Uncapped counts give it 33 replicas on 32 ranks, 1.94 times the bound. Held by all ranks, it leaves them 8 slots
    # each, and a tenth of the load in 256 replicas: what the two heaviest of these have beside them can be the bound.
    load = np.ones((4, 256)) if rest == "equal" else lognormal(4, 256, 0.7, seed=2)
    load[:, 17] = 0
    load[:, 17] = 9 * load.sum(axis=1)
    np.testing.assert_allclose(check(load, 32, 288), em.lower_bound(load, num_ranks=32, num_slots=288), rtol=NEARLY)


# The worst of the two loads below over three seeds leaves a third of each margin. REF is the best search published.
@pytest.mark.parametrize(
    ("layers", "shape", "loads", "over_bound"),
    [
        (58, (256, 32, 288), "zipf", 1.0005),  # the goal is 1.0008; DeepSeek's greedy 1.0071
        (58, (256, 32, 288), "lognormal", 1.0005),
        (58, (256, 32, 256), "lognormal", 1.001),  # no redundancy: the greedy 1.056, REF 1.018, the bound 1.018
        (94, (128, 16, 144), "lognormal", 1.0005),  # the greedy 1.008
        (24, (32, 8, 40), "zipf", 1.001),  # REF 1.002
        (26, (64, 32, 96), "zipf", 1.008),
        (8, (256, 128, 384), "zipf", 1.005),  # three slots a rank: the greedy 1.07
        (12, (16, 8, 24), "zipf", 1.006),  # Llama-4: REF 1.019
        (32, (8, 8, 16), "lognormal", 1.0001),  # Mixtral: REF 1.063; here the bound is the optimum
    ],
)
def test_quality(layers: int, shape: tuple[int, int, int], loads: str, over_bound: float) -> None:
    num_experts, num_ranks, num_slots = shape
    load = zipf(layers, num_experts, 1.0, 11) if loads == "zipf" else lognormal(layers, num_experts, 0.7, 11)
    par = check(load, num_ranks, num_slots)
    bound = em.lower_bound(load, num_ranks=num_ranks, num_slots=num_slots)
    assert np.mean(par / bound) <= over_bound


def test_names_do_not_matter() -> None:
    # 1.5 has no ties in float64, so there is one plan, whatever the experts are called.
    load = np.random.default_rng(4).lognormal(0, 1.5, (3, 20))
    names = np.random.default_rng(5).permutation(20)
    for num_ranks, num_slots in [(4, 24), (8, 32), (20, 40), (5, 20)]:
        plain = plan_static(load, num_ranks, num_slots)
        renamed = np.empty_like(load)
        renamed[:, names] = load
        assert np.array_equal(plan_static(renamed, num_ranks, num_slots), names[plain])


def test_the_same_seed_gives_the_same_plan_and_layers_do_not_meddle() -> None:
    load = zipf(4, 24, 1.2, seed=6)
    plan = plan_static(load, 12, 36, seed=9)
    assert np.array_equal(plan_static(load, 12, 36, seed=9), plan)
    assert np.array_equal(plan_static(load[[2]], 12, 36, seed=9), plan[[2]])
    assert np.array_equal(plan_static(np.asfortranarray(load), 12, 36, seed=9), plan)
    assert not np.array_equal(plan_static(load, 12, 36, seed=10), plan)  # these layers are difficult: the seed counts


def test_the_load_is_left_alone_and_its_unit_does_not_matter() -> None:
    load = zipf(2, 40, 1.0, seed=7)
    before = load.copy()
    plan = plan_static(load, 8, 48)
    assert np.array_equal(load, before)
    assert np.array_equal(plan_static(load / 1024, 8, 48), plan)  # a power of two: exact in float64


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(256, 32), (64, 8), (16, 8), (8, 4)])
def test_more_slots_do_not_make_the_plan_worse(num_experts: int, num_ranks: int) -> None:
    load = np.random.default_rng(8).lognormal(5, 0.8, (6, num_experts))
    pars = [
        check(load, num_ranks, num_slots).mean() for num_slots in range(num_experts, 2 * num_experts + 1, num_ranks)
    ]
    assert all(more <= fewer + NEARLY for fewer, more in pairwise(pars)), pars


def test_a_slot_that_must_be_filled_can_hurt() -> None:
    # Four slots divide 3 + 2 and 4 + 1 exactly. Six slots must hold two experts twice, on different ranks; whichever
    # two are left whole, they differ by at least 1 of 5. So the property above is one of random loads, not of all.
    load = np.array([[3.0, 2.0, 4.0, 1.0]])
    assert check(load, 2, 4) == pytest.approx(1.0)
    assert check(load, 2, 6) == pytest.approx(1.1)
    assert em.lower_bound(load, num_ranks=2, num_slots=6) == pytest.approx(1.1)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_no_swap_is_overlooked(problem: tuple[Load, int, int], seed: int) -> None:
    """`_any_step` finds what `_least_step` and `_lowest_peak` look for, among all pairs of slots in plain loops."""
    load, num_ranks, num_slots = problem
    slots = plan_static(load, num_ranks, num_slots).reshape(len(load), num_ranks, -1)[0].astype(np.int64)
    layer = swaps.new_state(load.shape[1], num_ranks, slots.shape[1], load.shape[1])
    swaps.load_layer(load[0], slots, layer)
    random = np.random.default_rng(seed)
    rank, other = (int(each) for each in random.integers(0, num_ranks, 2))
    steps = (layer.share[rank][:, None] - layer.share[other]).ravel()
    step = float(random.choice(steps))
    for low in (step, float(np.nextafter(step, -np.inf)), step / 3):  # at its edges the range takes in its ends
        high = float(random.choice([low, step, 2 * abs(step)]))
        if low <= high:
            half = (high - low) / 2
            inside = bool(((steps >= low) & (steps <= high)).any())
            found = swaps._any_step(rank, other, low + half, half + layer.load[rank] * 1e-12 + 1e-300, layer)
            assert found or not inside
    misses = np.abs(layer.share[rank][:, None] - step / 2 - layer.share[other])
    assert swaps._any_step(rank, other, step / 2, abs(step) / 2, layer) == bool((misses < abs(step) / 2).any())


# Means and worst layers over two loads of each shape. Swaps and changes of single replicas alone leave worst layers of
# 1.12, 1.30 and 1.33 times the bound, FlashLB means of 1.0037 at exponent 1.8.
@pytest.mark.parametrize(
    ("exponent", "mean", "worst"), [(1.5, 1.0015, 1.015), (1.8, 1.0015, 1.015), (2.0, 1.009, 1.035)]
)
@pytest.mark.parametrize("shape", [(58, 256, 32, 288), (60, 384, 32, 416), (94, 128, 16, 144)])
def test_steep_loads(shape: tuple[int, int, int, int], exponent: float, mean: float, worst: float) -> None:
    layers, num_experts, num_ranks, num_slots = shape
    load = np.concatenate([zipf(layers, num_experts, exponent, seed) for seed in (0, 1)])
    ratio = check(load, num_ranks, num_slots) / em.lower_bound(load, num_ranks=num_ranks, num_slots=num_slots)
    assert ratio.mean() <= mean
    assert ratio.max() <= worst


def held_out(model: str, seed: int, num_ranks: int, num_slots: int) -> tuple[float, float]:
    """Mean PAR on the windows that were not planned from: of evenmoe's plan of the others' sum, and of greedy's."""
    trace = synthesize(model, num_windows=24, tokens_per_window=4096, requests=32, request_windows=4, seed=seed)
    windows = trace.load[:, ::6].astype(float)
    order = np.random.default_rng(seed).permutation(24)
    past, future = windows[order[:12]].sum(axis=0), windows[order[12:]]
    plans = [plan(past, num_ranks=num_ranks, num_slots=num_slots) for plan in (em.plan, plan_greedy)]
    ours, theirs = (float(em.peak_to_average(future, plan).mean()) for plan in plans)
    return ours, theirs


@pytest.mark.parametrize(
    ("model", "num_ranks", "num_slots"),
    [("deepseek-v3", 128, 384), ("olmoe-1b-7b", 16, 80), ("gpt-oss-20b", 8, 40), ("gpt-oss-20b", 32, 64)],
)
def test_plans_of_a_sum_are_no_worse_than_greedy_on_windows_that_they_have_not_seen(
    model: str, num_ranks: int, num_slots: int
) -> None:
    # Four recordings of each; worse is what two standard errors do not explain.
    # 128 experts on 192 slots of 64 ranks stay 0.7 % worse, as they were: variances of that recording grow otherwise.
    ratios = np.array([ours / theirs for ours, theirs in (held_out(model, s, num_ranks, num_slots) for s in range(4))])
    assert ratios.mean() <= 1 + 2 * ratios.std(ddof=1) / 2


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.0, 30.0]), st.integers(1, 2**32))
def test_longer_searches_leave_a_placement_that_is_no_worse(
    problem: tuple[Load, int, int], weight: float, seed: int
) -> None:
    load, num_ranks, num_slots = problem
    if num_slots >= num_ranks * load.shape[1]:
        return  # every rank can hold every expert
    loads = np.sort(load[0])[::-1].copy()
    slots = plan_static(loads[None], num_ranks, num_slots).reshape(num_ranks, -1).astype(np.int64)
    counts = np.bincount(slots.ravel(), minlength=loads.size)
    goal = float(loads.sum() / num_ranks) or 1.0
    room, random = np.full(num_ranks, slots.shape[1]), np.array([seed], np.uint64)
    for search in ("restart", "refine"):
        before = plain_score(loads, slots, goal, weight)
        if search == "restart":
            peak = restart(loads, goal, 5, random, loads.size, room, weight, slots)
        else:
            peak = refine(loads, goal, 20, random, loads.size, np.minimum(counts, 2), weight, slots)
        placement = em.Placement(slots.reshape(1, -1).astype(np.int32), num_ranks, num_experts=loads.size)
        assert duplicates(placement.slot_to_expert, num_ranks) == 0
        assert peak == pytest.approx(even_rank_loads(loads[None], placement).max(), rel=1e-9, abs=1e-9)
        # Sums of a few hundred terms in another order, under a logarithm and times 30.
        assert plain_score(loads, slots, goal, weight) <= before + 1e-9 * max(1.0, goal)
        if search == "restart":
            counts = np.bincount(slots.ravel(), minlength=loads.size)
    assert (np.bincount(slots.ravel(), minlength=loads.size) >= np.minimum(counts, 2)).all()


def plain_score(loads: Load, slots: npt.NDArray[np.int64], goal: float, weight: float) -> float:
    """What `refine` and `restart` make small, as it is written, rank by rank."""
    counts = np.bincount(slots.ravel(), minlength=loads.size)
    rank_loads = [float(sum(loads[e] / counts[e] for e in rank)) for rank in slots.tolist()]
    mean = sum(rank_loads) / len(rank_loads)
    if weight == 0:
        return max(rank_loads)
    if mean == 0:
        return 0.0
    powers = [
        4 * (load / mean - 1) + 16 / 2 * sum(loads[e] / mean / counts[e] ** 2 for e in rank)
        for load, rank in zip(rank_loads, slots.tolist(), strict=True)
    ]
    soft = float(np.logaddexp.reduce(np.array(powers))) - np.log(len(powers))
    return weight * max(max(rank_loads) / goal - 1, 0) + soft / 4


def test_an_expert_keeps_its_replicas_where_one_less_would_be_the_riskiest() -> None:
    # u is 4, 2, 1, 1, 0, ... of 8: 12, 7.7, 5, 5 at risk. Two replicas of expert 0 have 6 each, the largest is 7.7.
    loads = np.array([4.0, 2, 1, 1, 0, 0, 0, 0])
    slots = np.array([[0, 2, 3], [0, 1, 4], [5, 6, 7]])
    assert _least_replicas(loads, slots, 8).tolist() == [2, 1, 1, 1, 1, 1, 1, 1]  # 12 > 1.1 × 7.7
    assert _least_replicas(np.zeros(8), slots, 8).tolist() == [1] * 8
