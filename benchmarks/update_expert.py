"""Cost of `update_expert` after `prepare`, as a ratio to one `torch.take` of the same ids in the same run.

The sizes are the chip's largest: (512, 16) ids, 1,024 experts. Each figure is the median of several rounds of CPU time.
Target: a ratio of at most 1.5.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import evenmoe as em
from evenmoe.ops.update_expert import prepare

TOKENS, TOP_K, EXPERTS, RANKS, MOST_REPLICAS = 512, 16, 1024, 64, 8
ROUNDS, CALLS = 15, 400


def microseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU time per call; the functions take turns, so that a busy moment hits them all."""
    for function in functions.values():
        for _ in range(CALLS):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(CALLS):
                function()
            times[name].append((time.process_time() - start) / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def random_table(rng: np.random.Generator) -> torch.Tensor:
    counts = rng.integers(1, MOST_REPLICAS + 1, EXPERTS)
    table = np.zeros((EXPERTS, 1 + MOST_REPLICAS), np.int32)
    table[:, 0] = counts
    slot = 0
    for expert, count in enumerate(counts):
        table[expert, 1 : 1 + count] = np.arange(slot, slot + count)
        slot += count
    return torch.from_numpy(table)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    table = random_table(rng)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread; ids ({TOKENS}, {TOP_K}), {EXPERTS} experts")
    for dtype in (torch.int64, torch.int32):
        ids = torch.from_numpy(rng.integers(0, EXPERTS, (TOKENS, TOP_K))).to(dtype)
        lookup = torch.arange(EXPERTS).to(dtype)
        index = ids.long()
        functions: dict[str, Callable[[], object]] = {"torch.take": partial(torch.take, lookup, index)}
        for mode in ("rank", "token", "occurrence"):
            for check in (True, False):
                prepared = prepare(table, 5, RANKS, mode, check_values=check)
                expected, _ = em.update_expert(ids, table, 5, RANKS, mode, limits=None)
                assert torch.equal(prepared(ids), expected)
                name = f"{mode}, values {'checked' if check else 'trusted'}"
                functions[name] = partial(prepared, ids)
        result = microseconds(functions)
        for name, value in result.items():
            print(f"{dtype!s:12}  {name:28} {value:7.1f} us  ratio {value / result['torch.take']:5.2f}")


if __name__ == "__main__":
    main()
