"""Many steps of random sizes over shared memory: every value right, and no memory, descriptor or segment left over.

    python -m tests.transport.soak --steps 100000          # about ten minutes on two cores

Sizes go from nothing to four times the usual ones, and in a tenth of the steps every token of all ranks wants the same
expert. Each rank compares what it holds (memory of its own and shared, descriptors, mappings) after a quarter of the
steps with what it holds at the end. A world of its own is opened and closed every `--worlds` steps. Expected values are
known beforehand: expert e multiplies by e + 1, and all numbers are small and whole, so that every sum is exact in
float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.transport.world import Rank
from tests.processes import run_once

RANKS, EXPERTS, TOP_K = 4, 8, 3
#: What a rank may hold more at the end: the allocator keeps what is freed in pieces, 1.2 MB after 100,000 steps.
ALLOWED_BYTES = 4 << 20
USUAL, LARGEST, WIDEST = [0, 1, 5, 40, 300], 1200, 1000  # tokens of a rank, the same in few steps, and hidden
#: Shared memory that was touched once stays. The largest steps may come late, and be as skewed as can be: all pairs'
#: float64 rows on one rank, in two windows that are used in turn. A leak is beyond it within some hundred steps.
ALLOWED_SHARED_BYTES = 2 * RANKS * LARGEST * TOP_K * WIDEST * 8


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of anonymous and of shared memory, open files, mappings of shared memory."""

    anonymous: int
    shared: int
    files: int
    mappings: int


def held() -> Held:
    gc.collect()
    with suppress(AttributeError):  # of the GNU C library, which keeps what is freed, up to 64 MB, for what comes next
        ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mappings = Path("/proc/self/maps").read_text().count("memfd:evenmoe")
    anonymous, shared = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return Held(anonymous, shared, len(list(Path("/proc/self/fd").iterdir())), mappings)


def step(rank: Rank, layer: em.ExpertParallel, draw: random.Random) -> str:
    """One dispatch and combine of a size that `draw`, equal on all ranks, chooses; what is wrong with them."""
    tokens = [draw.choice(USUAL) for _ in range(RANKS)][rank.index]
    hidden, dtype = draw.choice([1, 7, 64, WIDEST]), draw.choice([torch.float32, torch.bfloat16, torch.float64])
    operators, seed = draw.random() < 0.2, draw.randrange(2**30)
    hot, large = draw.random() < 0.1, draw.random() < 0.002
    if large:
        tokens, operators = LARGEST, False
    generator = torch.Generator().manual_seed(seed + rank.index)
    x = torch.randint(-8, 9, (tokens, hidden), generator=generator).to(dtype)
    scores = torch.rand((tokens, EXPERTS), generator=generator)
    if hot:
        scores[:, seed % EXPERTS] += 1.0  # above all others
    ids = scores.topk(TOP_K, dim=1).indices.int()
    weights = torch.randint(0, 3, (tokens, TOP_K), generator=generator).float()
    if operators:
        dtype = torch.bfloat16
        x = x.to(dtype)
        sent = em.dispatch(x, ids, ep=rank.ep, num_experts=EXPERTS, global_bs=RANKS * max(USUAL))
        rows, counts = sent.expand_x, sent.expert_token_nums
    else:
        sent = layer.dispatch(x, ids, weights)
        rows, counts = sent.rows, sent.num_tokens_per_expert
    local = EXPERTS // RANKS
    factors = (torch.arange(local) + 1 + rank.index * local).repeat_interleave(counts)
    out = rows.clone()
    out[: len(factors)] *= factors[:, None].to(dtype)
    if operators:
        y = em.combine(out, ids, sent, weights, ep=rank.ep, num_experts=EXPERTS, global_bs=RANKS * max(USUAL))
    else:
        y = layer.combine(sent, out)
    out.fill_(float("nan"))  # nobody may read it any more
    expected = (x.double() * (weights.double() * (ids + 1)).sum(dim=1, keepdim=True)).to(dtype)
    return "" if torch.equal(y, expected) else f"wrong values for {tokens} tokens of {hidden}, {dtype}"


def step_elsewhere(table: torch.Tensor, draw: random.Random) -> str:
    """A step in a world that is opened for it and closed after it."""
    rank = em.process_world(RANKS, transport="shared_memory", timeout_s=60.0)
    problem = step(rank, em.ExpertParallel(rank.ep, table, num_slots=EXPERTS), draw)
    rank.close()
    return problem


def soak(index: int, store: str, steps: int, worlds: int, seconds: float, seed: int) -> tuple[int, Held, Held]:
    """(steps made, what is held after a quarter, what is held at the end) of one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=index, world_size=RANKS)
    rank = em.process_world(RANKS, transport="shared_memory", timeout_s=60.0)
    table = em.Placement([list(range(EXPERTS))], RANKS).eplb_table(0)
    layer, draw, begin = em.ExpertParallel(rank.ep, table, num_slots=EXPERTS), random.Random(seed), time.monotonic()
    early, made, warm = held(), 0, False
    for made in range(1, steps + 1):
        problem = step(rank, layer, draw)
        assert not problem, f"step {made}: {problem}"
        if made % worlds == 0:
            problem = step_elsewhere(table, draw)
            assert not problem, f"step {made}, in a world of its own: {problem}"
        if not warm and (made >= steps // 4 or time.monotonic() - begin > seconds / 4):
            warm, early = True, held()
        if made % 100 == 0:  # agreed, since all must stop at the same step
            late = torch.tensor([[int(time.monotonic() - begin > seconds)]] * RANKS)
            if rank.ep.exchange_counts(late).any():
                break
    return made, early, held()


def segments() -> list[Path]:
    """What stands in /dev/shm, but for the semaphores of whatever else runs on this machine."""
    return sorted(path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem."))


def problems_of(results: Sequence[object], files_before: list[Path]) -> list[str]:
    found = []
    for index, result in enumerate(results):
        if not isinstance(result, tuple):
            found.append(f"rank {index}: {result!r}")
            continue
        _, early, late = result
        if late.anonymous - early.anonymous > ALLOWED_BYTES:
            found.append(f"rank {index} holds {late.anonymous - early.anonymous} bytes more")
        if late.shared - early.shared > ALLOWED_SHARED_BYTES:
            found.append(f"rank {index} holds {late.shared - early.shared} bytes of shared memory more")
        if late.files > early.files or late.mappings > early.mappings:
            found.append(f"rank {index} held {early}, and holds {late}")
    if segments() != files_before:
        found.append("something is left in /dev/shm")
    return found


def run(steps: int, worlds: int, seconds: float = 1e5, seed: int = 3) -> tuple[list, list[str]]:
    """What every rank reports, and what is wrong."""
    before = segments()
    with tempfile.TemporaryDirectory() as folder:
        results = run_once(RANKS, soak, f"{folder}/store", steps, worlds, seconds, seed, patience_s=seconds + 300.0)
    return results, problems_of(results, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--worlds", type=int, default=2000, help="steps between two worlds that are opened and closed")
    parser.add_argument("--seconds", type=float, default=1e5, help="after which the ranks stop early")
    parser.add_argument("--seed", type=int, default=3, help="of sizes and values, for other steps in another run")
    options = parser.parse_args()
    results, problems = run(options.steps, options.worlds, options.seconds, options.seed)
    for index, result in enumerate(results):
        print(f"rank {index}: {result}")
    print("\n".join(problems) or "nothing is left over, and every value was right")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
