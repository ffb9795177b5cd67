"""Incremental plans under drift: copies a layer, peak-to-average load before and after, CPU time.

DeepSeek-V3's shape, 58 layers of 256 experts in 288 slots on 32 ranks, Zipf(1.0) load; every step multiplies the
popularities by lognormal(0.15) and draws 200,000 tokens a layer anew. Four steps, each from the placement before.
Targets: at most 30 copies a layer at a peak-to-average load of at most 1.010, in at most 0.2 ms a layer.
"""

from __future__ import annotations

import platform
import time

import numpy as np
import numpy.typing as npt

import evenmoe as em

LAYERS, EXPERTS, SLOTS, RANKS, TOKENS, STEPS, DRIFT = 58, 256, 288, 32, 200_000, 4, 0.15
SEEDS = (101, 102, 103)


def tokens(rng: np.random.Generator, popularity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return rng.poisson(popularity / popularity.sum(axis=1, keepdims=True) * TOKENS)


def run(seed: int, max_copies: int | None, target_par: float | None) -> npt.NDArray[np.float64]:
    """Means over the steps: PAR before, PAR after, copies, worst layer's PAR, CPU ms per layer."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, EXPERTS + 1)
    popularity = np.stack([rng.permutation(1.0 / ranks) for _ in range(LAYERS)])
    popularity = popularity * rng.lognormal(0, 0.1, popularity.shape)
    placement = em.plan(tokens(rng, popularity), num_ranks=RANKS, num_slots=SLOTS)
    rows = []
    for _ in range(STEPS):
        popularity = popularity * rng.lognormal(0, DRIFT, popularity.shape)
        load = tokens(rng, popularity)
        start = time.process_time()
        after = em.plan(
            load,
            num_ranks=RANKS,
            num_slots=SLOTS,
            previous=placement,
            max_copies=max_copies,
            target_par=target_par,
        )
        spent = time.process_time() - start
        par = em.peak_to_average(load, after)
        rows.append(
            (
                em.peak_to_average(load, placement).mean(),
                par.mean(),
                em.count_copies(placement, after).mean(),
                par.max(),
                spent / LAYERS * 1e3,
            )
        )
        placement = after
    return np.mean(rows, axis=0)


def main() -> None:
    run(0, 30, None)  # compiles
    print(
        f"{platform.machine()}, one thread, CPU time; {LAYERS} layers, {EXPERTS} experts, {SLOTS} slots, {RANKS} ranks"
    )
    print(f"{'call':34} {'seed':>5} {'before':>8} {'after':>8} {'worst':>8} {'copies':>8} {'ms/layer':>9}")
    calls = {
        "max_copies=30": (30, None),
        "target_par=1.01": (None, 1.01),
        "max_copies=30, target_par=1.01": (30, 1.01),
        "max_copies=16": (16, None),
        "max_copies=288": (288, None),
    }
    for name, (max_copies, target_par) in calls.items():
        for seed in SEEDS:
            before, after, copies, worst, spent = run(seed, max_copies, target_par)
            print(f"{name:34} {seed:5} {before:8.4f} {after:8.4f} {worst:8.4f} {copies:8.1f} {spent:9.3f}")


if __name__ == "__main__":
    main()
