"""How often a gain is claimed where there is none, and found where there is one: `python benchmarks/evidence.py`.

500 synthetic recordings without a gain to be had (balanced routers, with and without bursts; or too few tokens), and
100 of nine windows or more whose experts differ and stay as they are. Every one goes through `judge_plan`, as `evenmoe
plan` does. Asked for is a claim in at most 2 % of the first, and in at least 98 % of the second. A third kind, "short",
differs from the second in having one to six windows: little can be known of it, and what is found is only shown.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.placement import default_placement
from evenmoe.planner.judging import judge_plan
from evenmoe.planner.options import PlanOptions

Load = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recording:
    """A synthetic load (T, L, E), the ranks and slots to plan for, and whether it has a gain that lasts."""

    kind: str
    load: Load
    ranks: int
    slots: int


def recording(kind: str, seed: int) -> Recording:
    """Make one.

    "balanced": every assignment to any expert alike. "bursts": each window prefers other experts, of which no part
    knows the next. "few": at most a few assignments for each rank, from a router that prefers some experts slightly.
    "skewed" and "short": some experts have several times the tokens of others in all windows.
    """
    random = np.random.default_rng(seed)
    ranks = int(random.choice([2, 4, 8]))
    experts = ranks * int(random.choice([1, 2, 4])) if kind not in ("skewed", "short") else ranks * 4
    slots = experts + ranks * int(random.choice([0, 1]))
    windows = int(random.choice([1, 2, 3, 6, 9, 18]))
    layers = int(random.choice([1, 2, 4, 6]))
    if kind in ("skewed", "short"):
        windows = int(random.choice([9, 18, 36] if kind == "skewed" else [1, 2, 3, 6]))
    if kind == "bursts":
        windows, slots = int(random.choice([9, 18])), experts
    size = int(10 ** random.uniform(1, 5))
    chances = np.ones((windows, layers, experts))
    if kind == "few":
        size = int(random.integers(1, 1 + 2 * ranks // windows + 2))
        chances *= random.gamma(20.0, 1.0, (layers, experts))
    if kind == "bursts":
        chances *= random.gamma(1.0, 1.0, chances.shape)
    if kind in ("skewed", "short"):
        size = int(10 ** random.uniform(3.5, 5))
        chances *= random.lognormal(0.0, 1.0, (layers, experts))
        chances[:, :, : experts // ranks] *= 3  # one rank of the default placement is the busiest, for certain
    chances /= chances.sum(axis=-1, keepdims=True)
    return Recording(kind, random.multinomial(size, chances), ranks, slots)


def claims_a_gain(made: Recording, planner: str) -> bool:
    """Whether `plan` says that there is a gain."""
    _, layers, experts = made.load.shape
    in_use = default_placement(layers, experts, made.ranks)
    verdict = judge_plan(made.load, PlanOptions(made.ranks, made.slots), in_use, planner=planner).verdict
    assert verdict is not None
    return verdict.kind == "gain"


def main() -> int:
    """Count; 1 where more or fewer are claimed than are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--null", type=int, default=500)
    parser.add_argument("--skewed", type=int, default=100)
    parser.add_argument("--planner", default="evenmoe", help="greedy is a hundred times as fast")
    options = parser.parse_args()
    made = [("balanced", "bursts", "few")[seed % 3] for seed in range(options.null)]
    made += ["skewed"] * options.skewed + ["short"] * options.skewed
    claimed = Counter(kind for seed, kind in enumerate(made) if claims_a_gain(recording(kind, seed), options.planner))
    for kind, number in Counter(made).items():
        print(f"{kind}: a gain claimed in {claimed[kind]} of {number}")
    false = sum(claimed[kind] for kind in ("balanced", "bursts", "few"))
    print(f"without a gain: {false / options.null:.1%} claimed; with one: {claimed['skewed'] / options.skewed:.1%}")
    return int(false > 0.02 * options.null or claimed["skewed"] < 0.98 * options.skewed)


if __name__ == "__main__":
    sys.exit(main())
