"""A replay made by a few lines of numpy: drifting skewed loads under placements with more and more replicas.

Not the simulator: even splits of replicas, a placement by sorting, a time that is rows and nothing else. Its numbers
look like real ones, which the pictures need, and every awkward size can be asked for.
"""

from __future__ import annotations

import math

import numpy as np

from evenmoe.metrics import even_rank_loads, peak_over_mean
from evenmoe.placement import Placement, default_placement
from evenmoe.simulator.policy_result import PolicyResult, Traffic
from evenmoe.simulator.result import Simulation

EXPERT_BYTES = 44_040_192  # one expert of DeepSeek-V3 in fp8


def make_replay(
    steps: int = 60,
    layers: int = 6,
    ranks: int = 8,
    experts: int = 32,
    policies: tuple[str, ...] = ("identity", "greedy", "evenmoe"),
    nodes: int = 2,
    seed: int = 0,
    trace: str = "synthetic drifting load",
) -> Simulation:
    """Policy p has p extra slots a rank and is refreshed every 16 steps, the first one never."""
    rng = np.random.default_rng(seed)
    loads = _loads(rng, steps, layers, experts, tokens=ranks * 128)
    results = [_replay(p, name, loads, ranks, nodes) for p, name in enumerate(policies)]
    base = results[0].step_time.mean()
    for p, result in enumerate(results[1:], start=1):
        saved, paid = base - result.step_time.mean(), result.copy_time.sum() / max(len(result.refreshes), 1)
        object.__setattr__(result, "break_even_steps", 0.0 if paid == 0 else paid / saved if saved > 0 else math.inf)
        assert p
    settings = (
        ("tokens per rank", "128", "tokens"),
        ("window", "16", "steps"),
        ("refreshed every", "16", "steps"),
        ("bytes of an expert", f"{EXPERT_BYTES}", "bytes"),
        ("link between nodes", "5e10", "bytes/s"),
    )
    return Simulation(
        trace, settings, ranks, nodes, experts, 8, np.full(steps, ranks * 128), loads.sum(axis=0), tuple(results),
        ("Everything here is synthetic.",), num_judged_steps=steps, recorded_tokens=steps * ranks * 128,
        assignments_per_step=ranks * 128 * 8,
    )  # fmt: skip


def _loads(rng, steps, layers, experts, tokens):
    """(N, L, E): popularity falls by rank of popularity and walks slowly."""
    weight = np.exp(rng.normal(0, 1.0, (layers, experts)))
    loads = np.zeros((steps, layers, experts), np.int64)
    for step in range(steps):
        weight = weight * np.exp(rng.normal(0, 0.08, weight.shape)) if step else weight
        share = weight / weight.sum(axis=1, keepdims=True)
        loads[step] = [rng.multinomial(tokens * 8, row) for row in share]
    return loads


def _replay(p, name, loads, ranks, nodes):
    steps, layers, experts = loads.shape
    placements = [default_placement(layers, experts, ranks)]
    refreshes = np.arange(16, steps, 16) if p else np.zeros(0, np.int64)
    if p:
        placements = [_spread(loads[max(0, at - 16) : at + (at == 0)].sum(axis=0), ranks, p) for at in (0, *refreshes)]
    held = np.searchsorted(refreshes, np.arange(steps), side="right")
    by_rank = np.stack([even_rank_loads(loads[step], placements[held[step]]) for step in range(steps)])
    copies = np.zeros((steps, layers), np.int64)
    for i, at in enumerate(refreshes.tolist()):
        copies[at] = (placements[i].slot_to_expert != placements[i + 1].slot_to_expert).sum(axis=1)
    rows = loads.sum(axis=(1, 2))
    between = rows * (nodes - 1) // nodes
    within = (rows - between) * (ranks // nodes - 1) // max(ranks // nodes, 1)
    return PolicyResult(
        name=name,
        description="The model's own placement." if p == 0 else f"{p} more slots a rank, refreshed every 16 steps.",
        rule=("rank", "token", "even", "batch")[p % 4],
        par=peak_over_mean(by_rank),
        rank_tokens=np.rint(by_rank.sum(axis=0)).astype(np.int64),
        copies=copies,
        refreshes=refreshes,
        traffic=Traffic(within, between, within * 3 // 4, between // 2),
        step_time=by_rank.max(axis=2).sum(axis=1) * 0.35,
        copy_time=copies.sum(axis=1) * 8.0,
        initial=placements[0],
        final=placements[-1],
        memory_per_rank=layers * placements[0].slots_per_rank * EXPERT_BYTES,
        break_even_steps=0.0,
    )


def _spread(load, ranks, extra):
    """The busiest experts twice, then all by falling share, each to the rank whose turn it is, there and back."""
    experts = load.shape[1]
    rows = []
    for row in load:
        counts = np.ones(experts, np.int64)
        for _ in range(ranks * extra):
            counts[np.argmax(np.where(counts < ranks, row / counts, -1.0))] += 1
        copies = np.repeat(np.arange(experts), counts)
        order = copies[np.argsort(-(row / counts)[copies], kind="stable")].reshape(-1, ranks)
        order[1::2] = order[1::2, ::-1]
        rows.append(order.T.reshape(-1))
    return Placement(np.stack(rows), ranks, num_experts=experts)
