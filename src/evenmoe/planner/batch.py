"""Planning for the `batch` rule: replicas placed so that the best split of a drifted batch still comes out even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import IntArray, Placement
from evenmoe.planner.scenarios import JITTER, drift_factors, scenarios_of
from evenmoe.planner.static import plan_static

Slots = npt.NDArray[np.int64]  # (G, n): the expert in each slot of each rank

_SCENARIOS = 32
# 20 drafts and 32 tried moves take 6…20 ms a layer on 8…32 ranks. Twice the scenarios gained nothing on unseen drift.
_DRAFTS = 20
_MOVES = 32
_MOVES_FROM_PREVIOUS = 200
_CANDIDATES = 8
# What a move must gain, and each copy on top, in mean rank loads: less is within what 32 scenarios can only pretend. At
# 0.0005 a copy, a third more copies came out no better on unseen drift (288 slots on 32 ranks).
_LEAST_GAIN = 1e-4
_PRICE_OF_COPY = 2e-3


def plan_batch(
    load: FloatArray,
    num_ranks: int,
    num_slots: int,
    previous: Placement | None = None,
    max_copies: int | None = None,
    seed: int = 0,
) -> IntArray:
    """The slots int32 (L, S) for `load` float64 (L, E) or (T, L, E), judged by the mean peak after the best split.

    Not the even split of a known load is wanted, which is easily had, but room to even out the loads that will come:
    a replica is a valve between the ranks that hold it, G − 1 extra replicas can link all G ranks, and a rank can pass
    on as much as its single experts leave it free. From scratch several drafts of this kind are judged on drifted
    loads and the best one is improved; with `previous` the search starts there, and every copy must pay.

    Args:
        load: with T > 1 the windows are the loads that the placement must serve, else they are made by drift.
        num_ranks, num_slots, previous, max_copies, seed: as in `plan`.
    """
    windows = load if load.ndim == 3 else load[None]
    num_layers, num_experts = windows.shape[1:]
    mean = windows.mean(axis=0)
    static = plan_static(mean, num_ranks, num_slots, seed).astype(np.int64).reshape(num_layers, num_ranks, -1)
    drifted = drift_factors(_SCENARIOS, num_experts, seed)
    jittered = drift_factors(_SCENARIOS, num_experts, seed, sizes=(JITTER,))
    result = np.empty((num_layers, num_slots), np.int32)
    for layer in range(num_layers):
        start = static[layer]
        if previous is not None:
            start = previous.slot_to_expert[layer].astype(np.int64).reshape(num_ranks, -1)
        if num_slots < num_experts * num_ranks and mean[layer].any():
            scenarios = scenarios_of(windows[:, layer], num_ranks, drifted, jittered)
            if previous is None:
                start = _best_draft(start, scenarios, seed)
                start = _improve(start, scenarios, None, None, _MOVES)
            else:
                start = _improve(start, scenarios, _held_by(start, num_experts), max_copies, _MOVES_FROM_PREVIOUS)
        result[layer] = start.reshape(-1)
    return result


def _best_draft(static: Slots, scenarios: FloatArray, seed: int) -> Slots:
    """The best on the scenarios of `static` and of drafts with different replica counts, links and reserves."""
    from evenmoe.planner import batch_kernels, draft_kernels  # not at the top: importing numba takes 0.3 s

    num_ranks = len(static)
    mean = scenarios.mean(axis=0)
    spread = scenarios.std(axis=0)
    order = np.argsort(-mean, kind="stable")
    rng = np.random.default_rng(seed)
    best, lowest = static, batch_kernels.evaluate(static, scenarios, np.inf)[0]
    for _ in range(_DRAFTS):
        power, reserve, caution = rng.uniform(0.85, 1.1), rng.uniform(0.1, 0.4), rng.uniform(0.0, 3.0)
        counts = draft_kernels.count_replicas(mean**power, static.size, num_ranks)
        held = np.empty_like(static)
        if draft_kernels.draft(mean, spread, order, counts, rng.random(num_ranks), reserve, caution, held):
            total = batch_kernels.evaluate(held, scenarios, lowest)[0]
            if total < lowest:
                best, lowest = held, total
    return best


def _improve(
    held: Slots, scenarios: FloatArray, kept: npt.NDArray[np.bool_] | None, max_copies: int | None, moves_left: int
) -> Slots:
    """Better slots after at most `moves_left` tried moves.

    Args:
        held: where to start.
        scenarios: (N, E).
        kept: bool (G, E), experts that cost no copy on a rank; None when nothing costs.
        max_copies: or None for as many as pay.
    """
    from evenmoe.planner import batch_kernels

    copies_left = held.size if max_copies is None else max_copies
    price = _PRICE_OF_COPY * len(scenarios)
    if kept is None:
        kept = np.ones((len(held), scenarios.shape[1]), np.bool_)
    moves = np.empty((_CANDIDATES, 5), np.int64)
    total, peaks, closed, load = batch_kernels.evaluate(held, scenarios, np.inf)
    while True:
        worst_first = np.argsort(-peaks, kind="stable")  # a bad move then shows after few scenarios
        scenarios, closed, load, peaks = (
            scenarios[worst_first],
            closed[worst_first],
            load[worst_first],
            peaks[worst_first],
        )
        by_expert = np.ascontiguousarray(scenarios.T)
        limit = total - _LEAST_GAIN * len(scenarios)
        step = None
        for hot in _blamed(peaks, closed):
            found = batch_kernels.candidates(held, by_expert, closed, load, kept, hot, copies_left, price, limit, moves)
            for mine, rank, theirs, keeps, copies in moves[:found].tolist():
                if moves_left == 0:
                    return held
                moves_left -= 1
                trial = held.copy()
                trial[rank, theirs] = held[hot, mine]
                if not keeps:
                    trial[hot, mine] = held[rank, theirs]
                judged = batch_kernels.evaluate(trial, scenarios, limit - price * max(copies, 0))
                if judged[0] < np.inf:
                    step = trial, copies, judged
                    break
            if step is not None:
                break
        if step is None:
            return held
        held, copies, (total, peaks, closed, load) = step
        copies_left -= copies


def _blamed(peaks: FloatArray, closed: npt.NDArray[np.bool_]) -> list[int]:
    """Ranks that take part in peaks above the mean, the ones with the largest part first."""
    blame = ((peaks - 1.0) / closed.sum(axis=1)) @ closed
    return [int(rank) for rank in np.argsort(-blame, kind="stable") if blame[rank] > 1e-9]


def _held_by(held: Slots, num_experts: int) -> npt.NDArray[np.bool_]:
    """bool (G, E): which rank holds which expert."""
    has = np.zeros((len(held), num_experts), np.bool_)
    has[np.arange(len(held))[:, None], held] = True
    return has
