"""Simulations made without the simulator: consistent in shape, arbitrary in value."""

from __future__ import annotations

import math

import numpy as np

from evenmoe.placement import Placement
from evenmoe.simulator.policy_result import Details, PolicyResult, Traffic
from evenmoe.simulator.result import Simulation


def make_simulation(
    steps: int = 12,
    layers: int = 3,
    ranks: int = 4,
    experts: int = 8,
    slots: int = 12,
    policies: tuple[str, ...] = ("identity", "greedy", "evenmoe"),
    seed: int = 0,
    details: bool = False,
) -> Simulation:
    """The first policy has the fewest slots, no copies and the highest PAR; the last one never breaks even."""
    rng = np.random.default_rng(seed)
    results = []
    for number, name in enumerate(policies):
        here = -(-experts // ranks) * ranks if number == 0 else slots
        first = Placement(np.tile(np.arange(here) % experts, (layers, 1)), ranks)
        last = first if number == 0 else Placement(first.slot_to_expert[:, ::-1], ranks)
        refreshes = np.arange(4, steps, 4) if number else np.zeros(0, np.int64)
        copies = np.zeros((steps, layers), np.int64)
        copies[refreshes] = rng.integers(1, slots, (len(refreshes), layers))
        between, within = rng.integers(500, 900, (2, steps))
        loads = rng.integers(50, 150, (steps, layers, ranks))
        results.append(
            PolicyResult(
                name=name,
                description=f"{name}, synthetic, for a test",
                rule=("rank", "token", "occurrence", "batch", "even")[number % 5],
                par=1.0 + rng.random((steps, layers)) * 2 / (1 + number),
                rank_tokens=loads.sum(axis=0),
                copies=copies,
                refreshes=refreshes.astype(np.int64),
                traffic=Traffic(within, between, within // 2, between // 2),
                step_time=rng.uniform(900, 1100, steps) / (1 + number),
                copy_time=copies.sum(axis=1) * 40.0,
                initial=first,
                final=last,
                memory_per_rank=layers * here // ranks * 44_040_192,
                break_even_steps=0.0 if number == 0 else math.inf if number == len(policies) - 1 else 37.5,
                details=Details(loads, rng.integers(0, 900, (steps, layers, 4)).astype(np.float64))
                if details
                else None,
            )
        )
    load = rng.integers(0, 500, (layers, experts))
    return Simulation(
        trace="synthetic",
        settings=(("ranks", str(ranks), ""), ("tokens per rank", "128", "tokens"), ("link", "5e+10", "bytes/s")),
        num_ranks=ranks,
        num_nodes=2,
        num_experts=experts,
        top_k=2,
        tokens=np.full(steps, ranks * 128, np.int64),
        load=load.astype(np.int64),
        policies=tuple(results),
        notes=("Every number here is invented.",),
        num_warmup_steps=min(2, steps - 1),
        num_judged_steps=steps - min(2, steps - 1),
        horizon_steps=700,
        copy_overlap=seed % 2 == 1,
        recorded_tokens=steps * ranks * 128,
        recorded_windows=seed % 3,
        assignments_per_step=ranks * 256,
        recorded_assignments_per_step=300.5 * (seed % 3),
        hardware="none",
    )
