"""Planning for the `batch` rule: replicas placed so that the best split of a drifted batch still comes out even."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.planner.kernels.batch import evaluate, first_better
from evenmoe.planner.kernels.batch_moves import candidates
from evenmoe.planner.kernels.packing import draft, replicate
from evenmoe.planner.options import Shape
from evenmoe.planner.slots import Slots, normalized
from evenmoe.planner.static import plan_static
from evenmoe.slot_arrays import held_by_rank

Held = npt.NDArray[np.int64]  # (G, n): the expert in each slot of each rank
Judged = tuple[float, FloatArray, npt.NDArray[np.bool_], FloatArray]  # as `evaluate` returns it

# Standard deviations of the logarithm of a load's drift, whose size is not known beforehand. With 0.3 alone plans are
# 0.2 % better where the drift is exactly 0.3 (288 slots on 32 ranks), and no better where it is larger.
DRIFTS = (0.2, 0.3, 0.45)
# With recorded windows the drift is in them already; this much keeps a plan from fitting a few windows too closely.
JITTER = 0.2
_SCENARIOS = 32
# 20 drafts and 32 tried moves take 5…15 ms a layer on 8…32 ranks. Twice the scenarios gained nothing on unseen drift.
_DRAFTS = 20
_MOVES = 32
# Moves tried from a placement in use; and in a row without a gain, before the next copy is allowed.
_MOVES_FROM_PREVIOUS = 80
_PATIENCE = 6
_CANDIDATES = 8
# What a move must gain, and each copy on top, in mean rank loads: less is within what 32 scenarios can only pretend. At
# 0.0005 a copy, a third more copies came out no better on unseen drift (288 slots on 32 ranks).
_LEAST_GAIN = 1e-4
PRICE_OF_COPY = 2e-3


def plan_anew(load: FloatArray, num_ranks: int, num_slots: int, world: int, seed: int) -> Slots:
    """Slots for `load` float64 (L, E) or (T, L, E), judged by the mean peak after the best split.

    Not the even split of a known load is wanted, which is easily had, but room to even out the loads that will come:
    a replica lets tokens move between the ranks that hold it, G - 1 extra replicas can link all G ranks, and a rank can
    pass on as much as its single experts leave it free. Several drafts of this kind are judged on drifted loads and the
    best one is improved.

    Args:
        load: with T > 1 the windows are the loads that the placement must serve, else they are made by drift.
        num_ranks, num_slots, seed: as in `plan`.
        world: not read: the split does not depend on where the tokens come from.
    """
    windows = load if load.ndim == 3 else load[None]
    slots = plan_static(windows.mean(axis=0), num_ranks, num_slots, seed)
    for layer, scenarios in _scenarios(windows, num_ranks, num_slots, seed):
        start = slots[layer].astype(np.int64).reshape(num_ranks, -1)
        slots[layer] = _improve(_best_draft(start, scenarios, seed), scenarios, _MOVES).reshape(-1)
    return Slots(slots)


def improve_used(load: FloatArray, used: Slots, shape: Shape, max_copies: int | None, seed: int) -> Slots:
    """As `plan_anew`, from the placement in use, its experts staying in their node; every copy must pay.

    The budget opens by one copy at a time and then the next moves are those within it, each of which lowers the mean
    peak of the scenarios: the plan of a smaller budget is a stop on the way of every larger one, which is no worse.
    """
    windows = load if load.ndim == 3 else load[None]
    slots = used.experts.astype(np.int32)
    copies = shape.num_slots if max_copies is None else max_copies
    kept = held_by_rank(slots, shape.num_ranks, shape.num_experts)
    for layer, scenarios in _scenarios(windows, shape.num_ranks, shape.num_slots, seed):
        held = slots[layer].astype(np.int64).reshape(shape.num_ranks, -1)
        slots[layer] = _spend(held, scenarios, kept[layer], copies, shape.node_ranks).reshape(-1)
    return Slots(slots)


def mean_peaks(load: FloatArray, slots: Slots, num_ranks: int, seed: int) -> FloatArray:
    """The mean peak of the scenarios of `load` after their best splits, (L,): what the plans here make small."""
    windows = load if load.ndim == 3 else load[None]
    num_layers, num_slots = slots.experts.shape
    held = slots.experts.astype(np.int64).reshape(num_layers, num_ranks, -1)
    peaks = np.ones(num_layers)
    for layer, scenarios in _scenarios(windows, num_ranks, num_slots, seed):
        peaks[layer] = _evaluate_all(held[layer], scenarios)[0] / len(scenarios)
    return peaks


def _scenarios(windows: FloatArray, num_ranks: int, num_slots: int, seed: int) -> Iterator[tuple[int, FloatArray]]:
    """The layers in which there is something to choose, and their scenarios (N, E)."""
    num_layers, num_experts = windows.shape[1:]
    drifted = drift_factors(_SCENARIOS, num_experts, seed)
    jittered = drift_factors(_SCENARIOS, num_experts, seed, sizes=(JITTER,))
    for layer in range(num_layers):
        if num_slots < num_experts * num_ranks and windows[:, layer].any():
            yield layer, scenarios_of(windows[:, layer], num_ranks, drifted, jittered)


def _best_draft(static: Held, scenarios: FloatArray, seed: int) -> Held:
    """The best on the scenarios of `static` and of drafts with different replica counts, links and slack."""
    num_ranks = len(static)
    mean = scenarios.mean(axis=0)
    spread = scenarios.std(axis=0)
    order = np.argsort(-mean, kind="stable")
    rng = np.random.default_rng(seed)
    floors = np.ones(len(scenarios))
    best, (lowest, peaks, _, _) = static, _evaluate_all(static, scenarios)
    hard_first = np.argsort(-peaks, kind="stable")
    for _ in range(_DRAFTS):
        power, slack, regularization = rng.uniform(0.85, 1.1), rng.uniform(0.1, 0.4), rng.uniform(0.0, 3.0)
        _, counts = replicate(mean**power, static.size, num_ranks)
        held = np.empty_like(static)
        if draft(mean, spread, order, counts, rng.random(num_ranks), slack, regularization, held):
            total = evaluate(held, scenarios, floors, hard_first, lowest)[0]
            if total < lowest:
                best, lowest = held, total
    return best


def _improve(held: Held, scenarios: FloatArray, tries: int) -> Held:
    """Better slots after at most `tries` tried moves, where copies cost nothing."""
    search = _Search(held, scenarios, np.ones((len(held), scenarios.shape[1]), np.bool_), len(held))
    while search.tried < tries and search.step(0, tries - search.tried) is not None:
        pass
    return search.held


def _spend(held: Held, scenarios: FloatArray, kept: npt.NDArray[np.bool_], max_copies: int, node_ranks: int) -> Held:
    """Better slots by at most `max_copies`; experts that are `kept` (G, E) on a rank cost none there."""
    search = _Search(held, scenarios, kept, node_ranks)
    opened = spent = 0
    while opened < min(max_copies, spent + 2) and search.tried < _MOVES_FROM_PREVIOUS:  # a move costs two at most
        opened += 1
        while (copies := search.step(opened - spent, _PATIENCE)) is not None:
            spent += copies
    return search.held


class _Search:
    """Slots under way, and what is known about their scenarios."""

    def __init__(self, held: Held, scenarios: FloatArray, kept: npt.NDArray[np.bool_], node_ranks: int) -> None:
        self.kept, self.node_ranks = kept, node_ranks
        self.tried = 0
        self._moves = np.empty((_CANDIDATES, 5), np.int64)
        self._floors = np.empty((_CANDIDATES, len(scenarios)))
        self._take(held, scenarios, _evaluate_all(held, scenarios))

    def step(self, copies: int, tries: int) -> int | None:
        """Make one move that pays for at most `copies` more; returns its copies, or None after `tries` in vain."""
        price = PRICE_OF_COPY * len(self.scenarios)
        limit = self.total - _LEAST_GAIN * len(self.scenarios)
        moves, floors = self._moves, self._floors
        for busy in _busiest(self.peaks, self.closed):
            found = candidates(
                self.held,
                self._by_expert,
                self.closed,
                self.load,
                self.kept,
                busy,
                self.node_ranks,
                copies,
                price,
                limit,
                moves,
                floors,
            )
            if found == 0:
                continue
            number = min(found, tries)
            tried, trial, total, peaks, closed, load = first_better(
                self.held, busy, moves[:number], floors[:number], self.scenarios, self.peaks, limit, price
            )
            self.tried += tried
            tries -= tried
            if total < np.inf:
                self._take(trial, self.scenarios, (total, peaks, closed, load))
                return int(moves[tried - 1, 4])
            if tries == 0:
                return None
        return None

    def _take(self, held: Held, scenarios: FloatArray, judged: Judged) -> None:
        self.held = held
        self.total, peaks, closed, load = judged
        worst_first = np.argsort(-peaks, kind="stable")  # so a bad move shows early where the floors do not say how
        self.scenarios, self.closed = scenarios[worst_first], closed[worst_first]
        self._by_expert = np.ascontiguousarray(self.scenarios.T)
        self.load, self.peaks = load[worst_first], peaks[worst_first]


def _evaluate_all(held: Held, scenarios: FloatArray) -> Judged:
    number = len(scenarios)
    return evaluate(held, scenarios, np.ones(number), np.arange(number), np.inf)


def _busiest(peaks: FloatArray, closed: npt.NDArray[np.bool_]) -> list[int]:
    """Ranks that take part in peaks above the mean, the ones with the largest part first."""
    part = ((peaks - 1.0) / closed.sum(axis=1)) @ closed
    return [int(rank) for rank in np.argsort(-part, kind="stable") if part[rank] > 1e-9]


def drift_factors(num_scenarios: int, num_experts: int, seed: int, sizes: tuple[float, ...] = DRIFTS) -> FloatArray:
    """Factors float64 (N, E) of drifted loads: lognormal with the sizes in turn, each expert evenly over its quantiles.

    Even quantiles (Latin hypercube) because 32 free draws would show a rank's experts busier or idler than they are.

    >>> drift_factors(3, 1, seed=0, sizes=(0.0,)).tolist()
    [[1.0], [1.0], [1.0]]
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / num_scenarios) for i in range(num_scenarios)])
    deviates = np.random.default_rng(seed).permuted(np.tile(quantiles, (num_experts, 1)), axis=1).T
    return np.exp(np.resize(sizes, num_scenarios)[:, None] * deviates)


def scenarios_of(windows: FloatArray, num_ranks: int, drifted: FloatArray, jittered: FloatArray) -> FloatArray:
    """The scenarios of one layer, float64 (N, E), each with a mean rank load of 1.

    Args:
        windows: (T, E), what was recorded; windows without load are left out. One window is drifted; of more each
            stands for itself, and they are repeated with jitter until there are enough.
        drifted, jittered: factors (N, E) for either case. More than 2 N windows are thinned evenly to 2 N.
    """
    windows = windows[windows.any(axis=1)]
    enough = len(drifted)
    if len(windows) == 1:
        loads = windows * drifted
    else:
        windows = windows[:: -(-len(windows) // (2 * enough))]
        more = np.resize(np.arange(len(windows)), max(enough - len(windows), 0))
        loads = np.concatenate([windows, windows[more] * jittered[: len(more)]])
    return normalized(loads, num_ranks)
