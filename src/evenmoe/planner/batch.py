"""Planning for the `batch` rule: replicas placed so that the best split of a drifted batch still comes out even."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray, Placement
from evenmoe.planner import batch_kernels, draft_kernels
from evenmoe.planner.scenarios import JITTER, drift_factors, scenarios_of
from evenmoe.planner.static import plan_static

Slots = npt.NDArray[np.int64]  # (G, n): the expert in each slot of each rank
Judged = tuple[float, FloatArray, npt.NDArray[np.bool_], FloatArray]  # as `evaluate` returns it

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


def plan_batch(load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0) -> IntArray:
    """The slots int32 (L, S) for `load` float64 (L, E) or (T, L, E), judged by the mean peak after the best split.

    Not the even split of a known load is wanted, which is easily had, but room to even out the loads that will come:
    a replica is a valve between the ranks that hold it, G − 1 extra replicas can link all G ranks, and a rank can pass
    on as much as its single experts leave it free. Several drafts of this kind are judged on drifted loads and the
    best one is improved.

    Args:
        load: with T > 1 the windows are the loads that the placement must serve, else they are made by drift.
        num_ranks, num_slots, seed: as in `plan`.
    """
    windows = load if load.ndim == 3 else load[None]
    static = plan_static(windows.mean(axis=0), num_ranks, num_slots, seed)
    result = static.copy()
    for layer, scenarios in _scenarios(windows, num_ranks, num_slots, seed):
        start = static[layer].astype(np.int64).reshape(num_ranks, -1)
        result[layer] = _improve(_best_draft(start, scenarios, seed), scenarios, _MOVES).reshape(-1)
    return result


def improve_batch(
    load: FloatArray, previous: Placement, max_copies: int | None, seed: int = 0, num_nodes: int = 1
) -> IntArray:
    """As `plan_batch`, from the placement in use, its experts staying in their node; every copy must pay.

    The budget opens by one copy at a time and then the next moves are those within it, each of which lowers the mean
    peak of the scenarios: the plan of a smaller budget is a stop on the way of every larger one, which is no worse.
    """
    windows = load if load.ndim == 3 else load[None]
    num_ranks, num_slots = previous.num_ranks, previous.num_slots
    result = previous.slot_to_expert.copy()
    for layer, scenarios in _scenarios(windows, num_ranks, num_slots, seed):
        held = previous.slot_to_expert[layer].astype(np.int64).reshape(num_ranks, -1)
        kept = np.zeros((num_ranks, previous.num_experts), np.bool_)
        kept[np.arange(num_ranks)[:, None], held] = True
        copies = num_slots if max_copies is None else max_copies
        result[layer] = _spend(held, scenarios, kept, copies, num_ranks // num_nodes).reshape(-1)
    return result


def judge_batch(load: FloatArray, placement: Placement, seed: int = 0) -> FloatArray:
    """The mean peak of the scenarios of `load` after their best splits, (L,): what the plans here make small."""
    windows = load if load.ndim == 3 else load[None]
    held = placement.slot_to_expert.astype(np.int64).reshape(placement.num_layers, placement.num_ranks, -1)
    peaks = np.ones(placement.num_layers)
    for layer, scenarios in _scenarios(windows, placement.num_ranks, placement.num_slots, seed):
        total = batch_kernels.evaluate(held[layer], scenarios, np.ones(len(scenarios)), np.inf)[0]
        peaks[layer] = total / len(scenarios)
    return peaks


def _scenarios(windows: FloatArray, num_ranks: int, num_slots: int, seed: int) -> Iterator[tuple[int, FloatArray]]:
    """The layers in which there is something to choose, and their scenarios (N, E)."""
    num_layers, num_experts = windows.shape[1:]
    drifted = drift_factors(_SCENARIOS, num_experts, seed)
    jittered = drift_factors(_SCENARIOS, num_experts, seed, sizes=(JITTER,))
    for layer in range(num_layers):
        if num_slots < num_experts * num_ranks and windows[:, layer].any():
            yield layer, scenarios_of(windows[:, layer], num_ranks, drifted, jittered)


def _best_draft(static: Slots, scenarios: FloatArray, seed: int) -> Slots:
    """The best on the scenarios of `static` and of drafts with different replica counts, links and reserves."""
    num_ranks = len(static)
    mean = scenarios.mean(axis=0)
    spread = scenarios.std(axis=0)
    order = np.argsort(-mean, kind="stable")
    rng = np.random.default_rng(seed)
    floors = np.ones(len(scenarios))
    best, lowest = static, batch_kernels.evaluate(static, scenarios, floors, np.inf)[0]
    for _ in range(_DRAFTS):
        power, reserve, caution = rng.uniform(0.85, 1.1), rng.uniform(0.1, 0.4), rng.uniform(0.0, 3.0)
        counts = draft_kernels.count_replicas(mean**power, static.size, num_ranks)
        held = np.empty_like(static)
        if draft_kernels.draft(mean, spread, order, counts, rng.random(num_ranks), reserve, caution, held):
            total = batch_kernels.evaluate(held, scenarios, floors, lowest)[0]
            if total < lowest:
                best, lowest = held, total
    return best


def _improve(held: Slots, scenarios: FloatArray, tries: int) -> Slots:
    """Better slots after at most `tries` tried moves, where copies cost nothing."""
    search = _Search(held, scenarios, np.ones((len(held), scenarios.shape[1]), np.bool_), len(held))
    while search.tried < tries and search.step(0, tries - search.tried) is not None:
        pass
    return search.held


def _spend(held: Slots, scenarios: FloatArray, kept: npt.NDArray[np.bool_], max_copies: int, node_ranks: int) -> Slots:
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

    def __init__(self, held: Slots, scenarios: FloatArray, kept: npt.NDArray[np.bool_], node_ranks: int) -> None:
        self.kept, self.node_ranks = kept, node_ranks
        self.tried = 0
        self._moves = np.empty((_CANDIDATES, 5), np.int64)
        self._floors = np.empty((_CANDIDATES, len(scenarios)))
        self._take(held, scenarios, batch_kernels.evaluate(held, scenarios, np.ones(len(scenarios)), np.inf))

    def step(self, copies: int, tries: int) -> int | None:
        """Make one move that pays for at most `copies` more; returns its copies, or None after `tries` in vain."""
        price = PRICE_OF_COPY * len(self.scenarios)
        limit = self.total - _LEAST_GAIN * len(self.scenarios)
        by_expert = np.ascontiguousarray(self.scenarios.T)
        moves, floors = self._moves, self._floors
        for hot in _blamed(self.peaks, self.closed):
            found = batch_kernels.candidates(
                self.held,
                by_expert,
                self.closed,
                self.load,
                self.kept,
                hot,
                self.node_ranks,
                copies,
                price,
                limit,
                moves,
                floors,
            )
            for move, (mine, rank, theirs, keeps, cost) in enumerate(moves[:found].tolist()):
                if tries == 0:
                    return None
                tries -= 1
                self.tried += 1
                trial = self.held.copy()
                trial[rank, theirs] = self.held[hot, mine]
                if not keeps:
                    trial[hot, mine] = self.held[rank, theirs]
                judged = batch_kernels.evaluate(trial, self.scenarios, floors[move], limit - price * max(cost, 0))
                if judged[0] < np.inf:
                    self._take(trial, self.scenarios, judged)
                    return cost
        return None

    def _take(self, held: Slots, scenarios: FloatArray, judged: Judged) -> None:
        self.held = held
        self.total, peaks, closed, load = judged
        worst_first = np.argsort(-peaks, kind="stable")  # a bad move then shows after few scenarios
        self.scenarios, self.closed = scenarios[worst_first], closed[worst_first]
        self.load, self.peaks = load[worst_first], peaks[worst_first]


def _blamed(peaks: FloatArray, closed: npt.NDArray[np.bool_]) -> list[int]:
    """Ranks that take part in peaks above the mean, the ones with the largest part first."""
    blame = ((peaks - 1.0) / closed.sum(axis=1)) @ closed
    return [int(rank) for rank in np.argsort(-blame, kind="stable") if blame[rank] > 1e-9]
