"""How often `advise` says that balancing pays: on loads where there is nothing to gain, and on lasting skews.

    python benchmarks/advice.py [--nulls 500] [--planted 200] [--json FILE]

Nulls are, in turn, balanced routers with many tokens, the same with a few hundred, and topics that are drawn anew for
every window, of which nothing that is learned lasts. Planted are experts whose popularity falls as 1/rank, in an
order that every layer has for itself and keeps. Both are experts of DeepSeek-V3's size on 8
ranks, in 4 layers of 32, 4 a token.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from evenmoe.advice import Advice, advise
from evenmoe.traces.models import ModelShape
from evenmoe.traces.trace import Trace

SHAPE = ModelShape("thirty-two of DeepSeek-V3's experts", 4, 32, 4, 7168, 2048, weight_bytes=1.0)
WINDOWS = 24


def null(seed: int) -> Trace:
    """A load on which no placement is better than another in the long run."""
    rng, kind = np.random.default_rng(seed), seed % 3
    size = (WINDOWS, SHAPE.num_layers)
    even = np.full(SHAPE.num_experts, 1 / SHAPE.num_experts)
    if kind == 0:
        load = rng.multinomial(200_000, even, size)
    elif kind == 1:
        load = rng.multinomial(int(rng.integers(8, 40)), even, size)
    else:
        topics = rng.dirichlet(np.full(SHAPE.num_experts, 2.0), size)
        load = rng.multinomial(20_000, topics)
    return Trace(f"null {seed}", load.astype(np.int64))


def planted(seed: int) -> Trace:
    """A skew that lasts."""
    rng = np.random.default_rng(seed)
    steep = 1 / np.arange(1, SHAPE.num_experts + 1)
    shares = np.stack([rng.permutation(steep / steep.sum()) for _ in range(SHAPE.num_layers)])
    load = rng.multinomial(50_000, np.broadcast_to(shares, (WINDOWS, *shares.shape)))
    return Trace(f"planted {seed}", load.astype(np.int64))


def asked(trace: Trace) -> Advice:
    """One answer, at batch sizes where there may be a gain."""
    return advise(trace, engine="vllm", gpu="H100", num_ranks=8, model=SHAPE, batch_sizes=(64, 1024, 16384))


def main() -> None:
    """Count the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nulls", type=int, default=500)
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {}
    for name, make, number in (("nulls", null, given.nulls), ("planted", planted, given.planted)):
        answers = Counter(asked(make(seed)).kind for seed in range(number))
        found[name] = {kind: answers[kind] for kind in ("pays", "does not pay", "too close to call")}
        print(name, found[name])
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
