"""Plans from windows: valid on every shape, deterministic, blind to names and units, optimal where all can be tried."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.planner import windows
from evenmoe.planner.kernels.soft_peak import search
from evenmoe.planner.windows import (
    BETAS,
    FOLDS,
    MARGIN,
    SHRINKAGES,
    TRIAL,
    USUAL,
    History,
    Regularization,
    choose_regularization,
    most_tries,
    plan_history,
    plan_windows,
    soft_peak_state,
)

Load = npt.NDArray[np.float64]


def comoving(seed: int, windows: int, layers: int = 3, experts: int = 32, factors: int = 4) -> Load:
    """Tokens (T, L, E): experts rise and fall together with a few hidden topics."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, experts + 1) ** 0.7
    tokens = np.empty((windows, layers, experts))
    for layer in range(layers):
        topics = rng.normal(0, 0.6 / np.sqrt(factors), (factors, experts))
        moves = rng.normal(size=(windows, factors)) @ topics
        tokens[:, layer] = popularity * np.exp(moves + rng.normal(0, 0.05, moves.shape))
    return rng.poisson(tokens / tokens.sum(axis=-1, keepdims=True) * 20_000).astype(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Load, int, int]:
    num_experts, num_ranks = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    width = -(-num_experts // num_ranks) + draw(st.integers(0, 3))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 3)), num_experts)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = {
        "zero": lambda: np.zeros(shape),
        "equal": lambda: np.full(shape, 7.0),
        "one hot": lambda: np.eye(num_experts)[random.integers(0, num_experts, shape[:2])] * 1000,
        "few": lambda: random.poisson(0.3, shape).astype(float),
        "ties": lambda: random.integers(0, 4, shape).astype(float),
        "spread": lambda: random.lognormal(0, 1.5, shape),
    }[draw(st.sampled_from(["zero", "equal", "one hot", "few", "ties", "spread"]))]()
    if draw(st.booleans()):
        load[random.random(shape[:2]) < 0.4] = 0  # windows and layers without load
    if draw(st.booleans()):
        load = load[random.integers(0, len(load), len(load))]  # some windows twice
    return load, num_ranks, num_ranks * width


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 2**64))
def test_any_shape_gives_a_placement(problem: tuple[Load, int, int], seed: int) -> None:
    load, num_ranks, num_slots = problem
    before = load.copy()
    placement = em.plan(load, num_ranks=num_ranks, num_slots=num_slots, seed=seed)
    assert np.array_equal(load, before)
    assert placement.slot_to_expert.shape == (load.shape[1], num_slots)
    assert placement.num_replicas.min() >= 1
    if num_slots <= load.shape[2] * num_ranks:
        held = np.sort(placement.slot_to_expert.reshape(load.shape[1], num_ranks, -1), axis=2)
        assert (held[:, :, 1:] != held[:, :, :-1]).all()
    assert em.plan(load, num_ranks=num_ranks, num_slots=num_slots, seed=seed) == placement


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_neither_names_nor_units_matter(problem: tuple[Load, int, int], seed: int) -> None:
    """Renamed experts get the same plan renamed; windows count alike, however many tokens they had.

    Powers of two are exact in float64, other factors might turn a tie. Experts with equal loads in every window have no
    order of their own, so the loads are made to differ.
    """
    load, num_ranks, num_slots = problem
    random = np.random.default_rng(seed)
    load = np.where(load.sum(axis=2, keepdims=True) > 0, load + random.random(load.shape), 0)
    plain = plan_windows(load, num_ranks, num_slots, seed=1)
    names = random.permutation(load.shape[2])
    renamed = np.empty_like(load)
    renamed[:, :, names] = load * 2.0 ** random.integers(-40, 40, (*load.shape[:2], 1))
    if len(load) == 1 or num_slots >= num_ranks * load.shape[2]:
        return  # planned as one load, whose properties are the static plan's
    idle = load.sum(axis=(0, 2)) == 0  # in a layer without load nothing tells the experts apart
    assert np.array_equal(plan_windows(renamed, num_ranks, num_slots, seed=1)[~idle], names[plain][~idle])


def test_a_window_without_load_says_nothing() -> None:
    load = comoving(3, 2)
    with_idle = np.insert(load, 1, 0, axis=0)
    assert np.array_equal(plan_windows(load, 8, 40), plan_windows(with_idle, 8, 40))


@pytest.mark.parametrize("unit", [5e-324, 1e-310, 1e-150, 1.0, 1e150, 1e307])
def test_loads_at_the_ends_of_float64(unit: float) -> None:
    load = np.array([[[1.0, 1, 0, 0]], [[0, 0, 1, 1]], [[1, 0, 0, 1]], [[0, 1, 1, 0]], [[1, 1, 0, 0]]])
    assert np.array_equal(plan_windows(load * unit, 2, 4), plan_windows(load, 2, 4))


def soft_peak(windows: Load, noise: Load, slots: tuple[tuple[int, ...], ...], beta: float) -> float:
    """The sum over windows of log Σ exp(beta × load + beta² × variance / 2) over ranks, by its definition."""
    counts = np.bincount(np.concatenate(slots), minlength=len(noise))
    power = np.stack(
        [
            sum(beta * windows[:, e] / counts[e] + beta**2 * noise[e] / counts[e] ** 2 / 2 for e in rank)
            for rank in slots
        ]
    )
    return float(np.log(np.exp(power).sum(axis=0)).sum())


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "width"), [(4, 2, 2), (4, 2, 3), (5, 2, 3), (5, 3, 2), (6, 3, 2), (4, 4, 2)]
)
@pytest.mark.parametrize("seed", range(4))
def test_tiny_cases_are_solved(num_experts: int, num_ranks: int, width: int, seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 1, (3, 1, num_experts))  # 3 windows: the usual regularization
    history = History(load, num_ranks)
    slots = plan_history(history, num_ranks * width, USUAL, most_tries(3, num_ranks * width), seed=0)[0]
    windows = load[:, 0] * num_ranks / load[:, 0].sum(axis=1, keepdims=True)
    mean, variance = windows.mean(axis=0), windows.var(axis=0, ddof=1)
    smooth = mean + np.sqrt(1 - USUAL.shrinkage) * (windows - mean)

    def value(ranks: tuple[tuple[int, ...], ...]) -> float:
        return soft_peak(smooth, USUAL.shrinkage * variance, ranks, USUAL.beta)

    experts = set(range(num_experts))
    ranks = itertools.combinations(range(num_experts), width)
    every = itertools.combinations_with_replacement(list(ranks), num_ranks)
    least = min(value(plan) for plan in every if experts == set().union(*plan))
    # The search takes changes of at least 1e-9 a window.
    assert value(tuple(map(tuple, slots.reshape(num_ranks, width)))) <= least + 1e-8


def test_the_search_ends_when_nothing_helps() -> None:
    windows = np.array([[1.0, 0.5, 0.3, 0.2]])
    slots = np.arange(4)
    search(soft_peak_state(windows, np.zeros(4), 2, 4, 4), 3.0, 10**15, 50, np.array([1], np.uint64), slots)
    assert sorted(map(sorted, slots.reshape(2, 2).tolist())) == [[0, 3], [1, 2]]


def test_held_out_windows_gain_over_a_plan_for_the_mean() -> None:
    """The mean of 3 layers × 40 held-out windows; over seeds 0 to 9 the gain is 0.22 to 0.33."""
    load = comoving(0, windows=64)
    past, future = load[:24], load[24:]
    shape = {"num_ranks": 8, "num_slots": 40}
    from_windows = em.peak_to_average(future, em.plan(past, **shape)).mean()
    from_mean = em.peak_to_average(future, em.plan(past.sum(axis=0), **shape)).mean()
    assert from_windows < from_mean - 0.15


def test_the_regularization_is_changed_where_the_history_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that move together: believing none of it costs 16 % held out, 18 standard errors."""
    together = History(comoving(0, 40), 8)
    assert choose_regularization(together, 40) == USUAL
    monkeypatch.setattr(windows, "USUAL", USUAL._replace(shrinkage=1.0))
    monkeypatch.setattr(windows, "SHRINKAGES", (0.2,))
    assert choose_regularization(together, 40).shrinkage == 0.2


def test_equal_windows_are_planned_as_one() -> None:
    load = comoving(6, 1)
    repeated = np.repeat(load, 4, axis=0) * np.array([2, 0, 5, 1])[:, None, None]
    assert np.array_equal(plan_windows(repeated, 8, 40), plan_windows(load, 8, 40))


def test_more_slots_do_not_make_the_plan_worse() -> None:
    """On the windows planned from. A property of such loads, not of all: four slots can divide what six cannot.

    The search is a random one and aims at a smoothed peak, so neighbours may change places by the 0.005 allowed; a
    replica for every second expert gains 0.1 and more.
    """
    load = comoving(8, 12)
    pars = [em.peak_to_average(load, em.plan(load, num_ranks=8, num_slots=slots)).mean() for slots in range(32, 65, 8)]
    assert all(more <= fewer + 0.005 for fewer, more in itertools.pairwise(pars)), pars
    assert pars[-1] < pars[0] - 0.1


@pytest.mark.parametrize("seed", [22, 83, 96, 119])
def test_regularizations_are_judged_where_a_layer_has_load(seed):
    """Of two layers the second has no load in half of the windows; plain loops over the windows that it has.

    The seeds are those of the first 120 in which counting the other windows as even ones chooses another.
    """
    rng = np.random.default_rng(seed)
    number = int(rng.integers(6, 10))
    load = np.exp(rng.normal(0, 1, (number, 2, 8))) * 10
    load[rng.random(number) < 0.5, 1] = 0
    history = History(load, 2)
    layers = np.arange(2)
    fold = np.arange(number) * FOLDS // number

    def held_out(regularization: Regularization) -> np.ndarray:
        peaks = []
        for window in range(number):
            past = history.part(fold != fold[window], layers)
            slots = plan_history(past, 8, regularization, most_tries(number, 8) // TRIAL, 0)
            ranks = load[window, layers[:, None], slots].reshape(2, 2, 4).sum(axis=2)
            peaks.append([max(row) / (sum(row) / 2) for row in ranks.tolist() if sum(row)])
        return np.array([sum(row) / len(row) for row in peaks])

    best = USUAL
    for field, values in (("shrinkage", SHRINKAGES), ("beta", BETAS)):
        for value in values:
            gain = held_out(best) - held_out(best._replace(**{field: value}))
            if gain.mean() > MARGIN * gain.std(ddof=1) / np.sqrt(number):
                best = best._replace(**{field: value})
    assert choose_regularization(history, 8) == best
