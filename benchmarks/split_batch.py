"""split_batch: CPU time a layer, and its peak against the linear programme's (HiGHS).

Loads: permuted 1 / rank times lognormal(0.1), planned for as they are, then times lognormal(drift), 200,000 tokens a
layer. Targets: within 0.01 % of the optimum (up to rounding to whole tokens) in at most 30 µs of CPU a layer.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

import evenmoe as em
from evenmoe.rules.split_batch import SplitPlan

SHAPES = ((128, 144, 16), (128, 160, 8), (256, 264, 8), (256, 288, 32), (256, 320, 32), (384, 416, 32))
DRIFTS, SEEDS, LAYERS, TOKENS = (0.3, 0.6), (1, 2, 3), 8, 200_000


def lowest_peak(tokens: np.ndarray, slots: np.ndarray, num_ranks: int) -> float:
    num_slots, num_experts = len(slots), len(tokens)
    column = np.arange(num_slots)
    on_rank = sparse.csr_matrix((np.ones(num_slots), (column // (num_slots // num_ranks), column)))
    of_expert = sparse.csr_matrix((np.ones(num_slots), (slots, column)), shape=(num_experts, num_slots))
    return linprog(
        np.r_[np.zeros(num_slots), 1.0],
        A_ub=sparse.hstack([on_rank, -np.ones((num_ranks, 1))]),
        b_ub=np.zeros(num_ranks),
        A_eq=sparse.hstack([of_expert, sparse.csr_matrix((num_experts, 1))]),
        b_eq=tokens,
        bounds=(0, None),
        method="highs-ds",
    ).fun


def cpu_us(call: Callable[[], object], calls: int) -> float:
    """Least of five means, so that other jobs on the machine count as little as possible."""
    means = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls):
            call()
        means.append((time.process_time() - start) / calls * 1e6)
    return min(means)


def run(num_experts: int, num_slots: int, num_ranks: int, drift: float) -> list[float]:
    """Median and worst µs of a prepared split, µs in a batch of layers, µs with preparation, HiGHS ms, gap, tokens."""
    prepared, batched, once, highs, gaps, over = [], [], [], [], [], []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        weights = np.stack([rng.permutation(1.0 / np.arange(1, num_experts + 1)) for _ in range(LAYERS)])
        weights *= rng.lognormal(0, 0.1, weights.shape)
        slots = em.plan(weights, num_ranks=num_ranks, num_slots=num_slots).slot_to_expert
        weights *= rng.lognormal(0, drift, weights.shape)
        tokens = np.rint(weights / weights.sum(axis=1, keepdims=True) * TOKENS).astype(np.int64)
        every = SplitPlan(slots, num_ranks, num_experts)
        batched.append(cpu_us(partial(every.split, tokens), 20) / LAYERS)
        for layer in range(LAYERS):
            plan = SplitPlan(slots[layer], num_ranks, num_experts)
            prepared.append(cpu_us(partial(plan.split, tokens[layer]), 100))
            once.append(cpu_us(partial(em.split_batch, tokens[layer], slots[layer], num_ranks), 50))
            peak = plan.split(tokens[layer]).reshape(num_ranks, -1).sum(axis=1).max()
            start = time.process_time()
            best = lowest_peak(tokens[layer], slots[layer], num_ranks)
            highs.append((time.process_time() - start) * 1e3)
            gaps.append(peak / best - 1)
            over.append(peak - np.ceil(best * (1 - 1e-9)))
    return [
        float(value)
        for value in (
            np.median(prepared),
            max(prepared),
            np.median(batched),
            np.median(once),
            np.median(highs),
            max(gaps),
            max(over),
        )
    ]


def main() -> None:
    print(f"{platform.machine()}, one thread, CPU time; {LAYERS} layers of {TOKENS} tokens, seeds {SEEDS}")
    print(
        f"{'experts, slots, ranks':>22} {'drift':>5} {'µs':>6} {'worst':>6} {'µs in a batch of layers':>24} "
        f"{'µs from scratch':>15} {'HiGHS ms':>9} {'worst gap':>9} {'tokens above the rounded optimum':>33}"
    )
    for shape in SHAPES:
        for drift in DRIFTS:
            us, worst, batched, once, highs, gap, over = run(*shape, drift)
            print(
                f"{shape!s:>22} {drift:5.1f} {us:6.1f} {worst:6.1f} {batched:24.1f} {once:15.1f} {highs:9.1f} "
                f"{gap:9.4%} {over:33.0f}"
            )


if __name__ == "__main__":
    main()
