"""How often `simulate` claims a gain: on traces of a balanced router, or too small, and on ones with a steady skew.

    python -m benchmarks.headline [--null N] [--skewed N]

A null trace is of a router that sends every token to any expert alike: with its tokens or as counts, of one window or
of many, of 1 to 60 steps, with 2 to 8 ranks. In a quarter of them every request has experts of its own (a Dirichlet
draw), so that steps are uneven and nothing lasts; there only what moves no slot is tried, since a replica helps against
unevenness of any kind. A skewed trace has a log-normal popularity of deviation 0.8 that never changes, and under which
the busiest rank of the default placement has 1.2 times the mean load or more; it has 1,000 tokens a step.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.headline import Headline
from evenmoe.simulator.replay import simulate
from evenmoe.traces.trace import Trace

#: A rank that takes as long for rows as DeepSeek-V3's experts take on an H800 with batches of thousands.
COSTS = CostModel.for_expert(
    1024, 1e6, 6e6, flops_per_s=6e12, memory_bytes_per_s=3.35e12, within_bytes_per_s=1.6e11, latency_us=5.0,
    start_us=0.0, slot_us=0.0, tile=1,
)  # fmt: skip


def draw_tokens(random: np.random.Generator, popularity: np.ndarray, count: int, layers: int, top_k: int) -> np.ndarray:
    """Experts of tokens, uint16 (tokens, layers, K), distinct, by popularity (tokens or 1, layers, experts)."""
    keys = random.exponential(size=(count, layers, popularity.shape[-1])) / popularity
    return np.argpartition(keys, top_k, axis=2)[:, :, :top_k].astype(np.uint16)


def default_par(popularity: np.ndarray, ranks: int) -> float:
    """Peak-to-average load of (layers, experts) on ranks that hold neighbors, the mean of the layers."""
    loads = popularity.reshape(len(popularity), ranks, -1).sum(axis=2)
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())


def make_trace(seed: int, *, skew: float) -> tuple[Trace, dict[str, int], bool]:
    """A trace, the world to replay it on, and whether its requests have experts of their own."""
    random = np.random.default_rng((seed, round(100 * skew)))
    ranks, layers, top_k = int(random.choice([2, 4, 8])), int(random.integers(1, 5)), int(random.integers(1, 5))
    experts = ranks * int(random.choice([2, 4, 8]))
    top_k = min(top_k, experts - 1)
    tokens = 1000 // ranks if skew else int(random.choice([16, 64, 128]))
    steps = int(random.integers(30, 60)) if skew else int(random.integers(1, 60))
    count = steps * ranks * tokens
    world = {"num_ranks": ranks, "tokens_per_rank": tokens, "top_k": top_k}
    popularity = np.exp(random.normal(0, skew, (1, layers, experts)))
    while skew and default_par(popularity[0], ranks) < 1.2:
        popularity = np.exp(random.normal(0, skew, (1, layers, experts)))
    kind = int(random.integers(4))
    if kind == 0 and not skew:  # requests of 8 to 200 tokens
        starts = np.unique(np.r_[0, np.cumsum(random.integers(8, 200, count // 8)).clip(0, count)])
        own = random.dirichlet(np.full(experts, 3.0), (len(starts) - 1, layers)) + 1e-9
        routing = draw_tokens(random, np.repeat(own, np.diff(starts), axis=0), count, layers, top_k)
        load = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routing.transpose(1, 0, 2)])
        return Trace("requests", load[None], routing, starts), world, True
    if kind <= 1:
        routing = draw_tokens(random, popularity, count, layers, top_k)
        load = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routing.transpose(1, 0, 2)])
        return Trace("tokens", load[None], routing), world, False
    windows = 1 if kind == 2 and not skew else int(random.integers(20 if skew else 2, 80))
    shares = popularity[0] / popularity[0].sum(axis=1, keepdims=True)
    load = random.multinomial(max(1, count * top_k // windows), shares, (windows, layers))
    return Trace("counts", load), world, False


def headline_of(seed: int, *, skew: float) -> Headline:
    """The headline of one trace, under the default policies."""
    trace, world, lasts_not = make_trace(seed, skew=skew)
    policies = [f"evenmoe:slots={trace.num_experts}", f"greedy:slots={trace.num_experts}"] if lasts_not else None
    return simulate(trace, policies, costs=COSTS, seed=seed, workers=1, **world).summary.headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--null", type=int, default=500)
    parser.add_argument("--skewed", type=int, default=100)
    options = parser.parse_args()
    for name, number, skew in (("null", options.null, 0.0), ("skewed", options.skewed, 0.8)):
        said = [headline_of(seed, skew=skew) for seed in range(number)]
        kinds = Counter((each.kind, each.reason) for each in said)
        claimed = sum(each.kind == "gain" for each in said)
        print(f"{name}: a gain is claimed of {claimed} of {number} traces ({100 * claimed / max(number, 1):.1f} %)")
        for (kind, reason), times in kinds.most_common():
            print(f"    {times:4}  {kind}{': ' * bool(reason)}{reason}")
        for seed, each in enumerate(said):
            if (each.kind == "gain") != bool(skew):
                print(f"    seed {seed}: {each.sentence} {each.measured_on.partition(';')[0]}")


if __name__ == "__main__":
    main()
