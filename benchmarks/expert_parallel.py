"""What the exchange of one MoE layer costs on CPUs: dispatch and combine of 4 processes, their CPU ms added up.

Each of ours over every transport of processes, and by hand over gloo; every result is compared with float64.

The same contract for all: rows expert by expert out, the weighted sum back. `by hand` is what one writes without a
library: a row for every (token, expert) through all_to_all_single, a sort at the receiver, index_add_ in float32.
Median of several steps after a warm-up, contestants in turn; one thread per process. Needs no arguments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.placement import default_placement

RANKS, STEPS = 4, 15
SHAPES = {
    "H 7168, E 256, T 512": (512, 7168, 256),
    "H 2048, E 64, T 512": (512, 2048, 64),
    "H 7168, E 256, T 16": (16, 7168, 256),
    "H 2048, E 64, T 16": (16, 2048, 64),
}
TOP_K = 8
TRANSPORTS = ("process_group", "shared_memory")
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[float]], torch.Tensor]


def by_hand(experts: int) -> Step:
    each = experts // RANKS

    def step(x, ids, weights, marks):
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        token = order // TOP_K
        counts = torch.bincount(flat // each, minlength=RANKS)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, recv = counts.tolist(), theirs.tolist()
        rows = x.new_empty((sum(recv), x.shape[1]))
        dist.all_to_all_single(rows, x[token], recv, send)
        chosen = flat.new_empty(sum(recv))
        dist.all_to_all_single(chosen, flat[order], recv, send)
        by_expert = chosen.argsort(stable=True)
        rows = rows[by_expert]
        marks.append(time.process_time())
        back = torch.empty_like(rows)
        back[by_expert] = rows
        home = x.new_empty((len(flat), x.shape[1]))
        dist.all_to_all_single(home, back, send, recv)
        y = torch.zeros(x.shape, dtype=torch.float32)
        y.index_add_(0, token, home.float() * weights.flatten()[order, None])
        return y.to(x.dtype)

    return step


def expert_parallel(rank: em.Rank, experts: int) -> Step:
    table = default_placement(1, experts, RANKS).eplb_table(0)
    layer = em.ExpertParallel(rank.ep, table, num_slots=experts)

    def step(x, ids, weights, marks):
        sent = layer.dispatch(x, ids, weights)
        marks.append(time.process_time())
        return layer.combine(sent, sent.rows)

    return step


def operators(rank: em.Rank, experts: int) -> Step:
    def step(x, ids, weights, marks):
        sent = em.dispatch(x, ids, ep=rank.ep, num_experts=experts, limits="unlimited")
        marks.append(time.process_time())
        return em.combine(sent.expand_x, ids, sent, weights, ep=rank.ep, num_experts=experts, limits="unlimited")

    return step


def measure(ranks: dict[str, em.Rank], shape: tuple[int, int, int]) -> dict[str, tuple[float, float]]:
    """Median CPU ms of (dispatch, combine) of this process."""
    tokens, hidden, experts = shape
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn((tokens, hidden), generator=generator).bfloat16()
    ids = torch.rand((tokens, experts), generator=generator).topk(TOP_K, dim=1).indices.int()
    weights = torch.rand((tokens, TOP_K), generator=generator)
    weights /= weights.sum(dim=1, keepdim=True)
    expected = x.double() * weights.double().sum(dim=1, keepdim=True)
    contestants = {"by hand": by_hand(experts)}
    for transport, rank in ranks.items():
        contestants[f"ExpertParallel, {transport}"] = expert_parallel(rank, experts)
        contestants[f"operators, {transport}"] = operators(rank, experts)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(STEPS):
        for name, step in contestants.items():
            dist.barrier()
            marks = [time.process_time()]
            y = step(x, ids, weights, marks)
            marks.append(time.process_time())
            found[name].append((marks[1] - marks[0], marks[2] - marks[1]))
            # A bfloat16 has 8 bits: every result is within half a unit of its last place of the true one.
            assert ((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all(), name
    return {
        name: (
            1e3 * statistics.median(d for d, _ in steps[2:]),
            1e3 * statistics.median(c for _, c in steps[2:]),
        )
        for name, steps in found.items()
    }


def process(index: int, directory: str, shape: tuple[int, int, int], results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=index, world_size=RANKS)
    ranks = {transport: em.process_world(RANKS, transport=transport) for transport in TRANSPORTS}
    results.put(measure(ranks, shape))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'CPU ms, 4 ranks together':34}{'dispatch':>10}{'combine':>10}{'both':>10}")
    for title, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            results = context.Queue()
            children = [
                context.Process(target=process, args=(i, str(Path(directory)), shape, results)) for i in range(RANKS)
            ]
            for child in children:
                child.start()
            measured = [results.get(timeout=300) for _ in children]
            for child in children:
                child.join()
        print(title)
        for name in measured[0]:
            dispatch, combine = (sum(one[name][part] for one in measured) for part in (0, 1))
            print(f"  {name:32}{dispatch:10.1f}{combine:10.1f}{dispatch + combine:10.1f}")


if __name__ == "__main__":
    main()
