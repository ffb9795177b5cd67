"""Decode: what the costliest rank reads and computes in a step, on requests that no plan has seen.

    python benchmarks/decode.py TRACE.npz ...

A trace has `routing`, experts of every token (tokens, layers, K), and `seq_start`, the first token of every request.
Requests with even numbers are planned on and those with odd ones judged, then the other way round; both count alike. A
step is T judged tokens drawn at random, its cost that of the costliest rank: 150 rows for every expert that it reads,
and its rows; the mean over steps and layers. All costs are relative to the published greedy plan on the same slots, its
experts' tokens divided evenly among replicas in turn. Without a trace only the split is timed and compared with the
least cost there is (HiGHS, 5 s a case).
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

import evenmoe as em
from evenmoe.compiled import compiled
from evenmoe.planner.greedy import plan_greedy
from evenmoe.rules import decode_kernels, split_kernels
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.slot_arrays import ranks_of_slots

WEIGHT_ROWS, TOKENS, STEPS, CALLS = 150, (16, 64, 256), 100, 200
SHAPES = ((32, 40, 8, 4), (64, 72, 8, 6), (64, 80, 8, 6), (256, 288, 32, 8), (256, 288, 16, 8))


def loads_of(routing: np.ndarray, num_experts: int) -> np.ndarray:
    """Assignments (layers, experts) of some tokens (tokens, layers, K)."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in routing.swapaxes(0, 1)])


def steps_of(routing: np.ndarray, num_tokens: int, number: int, num_experts: int) -> np.ndarray:
    """(number, layers, experts): assignments of steps of tokens, drawn without replacement where there are enough."""
    random = np.random.default_rng(num_tokens)
    few = len(routing) < num_tokens
    drawn = (random.choice(len(routing), num_tokens, replace=few) for _ in range(number))
    return np.stack([loads_of(routing[tokens], num_experts) for tokens in drawn])


def cost_of(per_slot: np.ndarray, num_ranks: int) -> float:
    """The mean over steps and layers of what the costliest rank costs: rows (steps, layers, slots)."""
    by_rank = per_slot.reshape(*per_slot.shape[:-1], num_ranks, -1)
    return float((by_rank.sum(axis=-1) + WEIGHT_ROWS * (by_rank > 0).sum(axis=-1)).max(axis=-1).mean())


def even_split(steps: np.ndarray, placement: em.Placement) -> np.ndarray:
    """Replica i of c takes the tokens i, i + c, i + 2c, … of its expert."""
    counts = np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)
    index = np.broadcast_to(placement.slot_to_expert, (len(steps), *placement.slot_to_expert.shape))
    return (np.take_along_axis(steps, index, axis=-1) + counts - 1 - placement.replica_index) // counts


def best_split(steps: np.ndarray, placement: em.Placement) -> np.ndarray:
    plan = SplitPlan(placement.slot_to_expert, placement.num_ranks, placement.num_experts)
    return np.stack([plan.split(step, weight_rows=WEIGHT_ROWS) for step in steps])


def relative_costs(
    planned: np.ndarray, judged: np.ndarray, num_experts: int, num_ranks: int, extra: int, num_tokens: int, number: int
) -> dict[str, float]:
    """Costs on judged tokens (tokens, layers, K) of plans from planned ones, over that of greedy with an even split."""
    load, steps = loads_of(planned, num_experts), steps_of(judged, num_tokens, number, num_experts)
    small = {"num_ranks": num_ranks, "num_slots": -(-num_experts // num_ranks) * num_ranks}
    large = {"num_ranks": num_ranks, "num_slots": small["num_slots"] + extra * num_ranks}
    decode = {
        "objective": "decode",
        "tokens_per_step": num_tokens,
        "top_k": planned.shape[2],
        "weight_rows": WEIGHT_ROWS,
    }
    greedy = plan_greedy(load, **large)
    base = cost_of(even_split(steps, greedy), num_ranks)
    costs = {
        "tokens": even_split(steps, em.plan(load, **small)),
        "decode": even_split(steps, em.plan(load, **small, **decode)),
        "greedy, split": best_split(steps, greedy),
        "decode, split": best_split(steps, em.plan(load, **large, rule="batch", **decode)),
    }
    return {name: cost_of(per_slot, num_ranks) / base for name, per_slot in costs.items()}


def halves_of(path: Path) -> tuple[list[np.ndarray], int]:
    """The tokens of requests with even and with odd numbers, and the number of experts."""
    with np.load(path) as trace:
        routing, starts, num_experts = trace["routing"], trace["seq_start"], trace["load"].shape[-1]
    odd = np.repeat(np.arange(len(starts) - 1) % 2, np.diff(starts)) == 1
    return [routing[~odd], routing[odd]], num_experts


def compare(path: Path) -> None:
    halves, num_experts = halves_of(path)
    num_ranks = 8 if num_experts <= 64 else 32
    for extra in (1, 2):
        for num_tokens in TOKENS:
            both = [
                relative_costs(*pair, num_experts, num_ranks, extra, num_tokens, STEPS)
                for pair in (halves, halves[::-1])
            ]
            costs = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
            shape = f"{num_experts} on {num_ranks}, {num_experts + extra * num_ranks} slots"
            print(f"{path.stem[:31]:>31} {shape:>20} {num_tokens:4}", *(f"{costs[name]:13.3f}" for name in costs))


@compiled
def assign_all(num_tokens, graphs, num_ranks, num_slots, calls):
    home, scratch = np.empty(num_tokens.shape[1], np.int64), np.empty((4, num_ranks), np.int64)
    for _ in range(calls):
        for layer in range(len(graphs)):
            sections = split_kernels.sections_of(graphs[layer], num_tokens.shape[1], num_slots, num_ranks)
            decode_kernels.assign_one(num_tokens[layer], sections, home, scratch[0], scratch[1], scratch[2], scratch[3])


def time_split(num_experts: int, num_slots: int, num_ranks: int, top_k: int, num_tokens: int) -> None:
    """µs of CPU a layer of 16, the least of five means; and how far above the least cost the split is."""
    random = np.random.default_rng(num_tokens)
    chances = np.stack([random.permutation(1 / np.arange(1, num_experts + 1) ** 0.8) for _ in range(16)])
    placement = em.plan(chances, num_ranks=num_ranks, num_slots=num_slots, rule="batch")
    tokens = np.stack([random.multinomial(num_tokens * top_k, layer / layer.sum()) for layer in chances])
    slots = placement.slot_to_expert.astype(np.int64)
    plan = SplitPlan(slots, num_ranks, num_experts)
    sizes = (num_slots // num_ranks,) * num_ranks
    graphs = split_kernels.graphs_of(slots, ranks_of_slots(sizes), num_ranks, num_experts)
    calls = {
        "one": lambda: assign_all(tokens, graphs, num_ranks, num_slots, CALLS),
        "split": lambda: [plan.split(tokens, weight_rows=WEIGHT_ROWS) for _ in range(CALLS)],
        "tokens": lambda: [plan.split(tokens) for _ in range(CALLS)],
    }
    least = dict.fromkeys(calls, np.inf)
    for turn in range(6):  # the first compiles
        for name, call in calls.items():
            start = time.process_time()
            call()
            used = (time.process_time() - start) / CALLS / 16 * 1e6
            least[name] = min(least[name], used) if turn else np.inf
    found = plan.split(tokens, weight_rows=WEIGHT_ROWS)[:4]
    gaps = [cost_of(found[i][None, None], num_ranks) / least_cost(tokens[i], slots[i], num_ranks) - 1 for i in range(4)]
    print(
        f"{(num_experts, num_slots, num_ranks)!s:>22} {num_tokens:4} {least['one']:12.2f} {least['split']:8.2f} "
        f"{least['tokens']:14.2f} {max(gaps):12.2%}"
    )


def least_cost(tokens: np.ndarray, slots: np.ndarray, num_ranks: int) -> float:
    """A lower bound of the costliest rank's cost, the least cost itself where 5 s are enough."""
    number = len(slots)
    eye, slot = sparse.eye(number), np.arange(number)
    on_rank = sparse.csr_matrix((np.ones(number), (slot // (number // num_ranks), slot)))
    of_expert = sparse.csr_matrix((np.ones(number), (slots, slot)), shape=(len(tokens), number))
    none, column = sparse.csr_matrix, np.ones((num_ranks, 1))
    rows = sparse.bmat(
        [
            [of_expert, none((len(tokens), number)), none((len(tokens), 1))],
            [eye, -sparse.diags(tokens[slots].astype(float)), none((number, 1))],
            [on_rank, WEIGHT_ROWS * on_rank, -column],
        ]
    )
    low = np.r_[tokens, np.full(number + num_ranks, -np.inf)]
    high = np.r_[tokens, np.zeros(number + num_ranks)]
    found = milp(
        np.r_[np.zeros(2 * number), 1.0],
        constraints=LinearConstraint(rows, low, high),
        integrality=np.r_[np.ones(2 * number), 0],
        bounds=Bounds(0, np.r_[np.full(number, np.inf), np.ones(number), np.inf]),
        options={"time_limit": 5.0},
    )
    return float(found.mip_dual_bound)


def main(paths: list[str]) -> None:
    print(f"{platform.machine()}, CPU time, {WEIGHT_ROWS} rows for the weights of an expert")
    if paths:
        names = ("tokens", "decode", "greedy, split", "decode, split")
        print(f"{'trace':>31} {'experts on ranks':>20} {'T':>4}", *(f"{name:>13}" for name in names))
        for path in paths:
            compare(Path(path))
    else:
        print(
            f"{'experts, slots, ranks':>22} {'T':>4} {'one each, µs':>12} {'split µs':>8} {'by tokens, µs':>14} "
            f"{'over least':>12}"
        )
        for shape in SHAPES:
            for num_tokens in TOKENS:
                time_split(*shape, num_tokens)


if __name__ == "__main__":
    main(sys.argv[1:])
