"""Placements of a policy: the one that it starts with, and its plans."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.planner.plan import plan
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.world import World


def first_placement(policy: Policy, world: World, num_layers: int, num_experts: int) -> Placement:
    """Slot s holds expert s mod E: what runs before anything is known."""
    slots = np.tile(np.arange(policy.num_slots, dtype=np.int32) % num_experts, (num_layers, 1))
    return Placement(slots, world.num_ranks, num_experts=num_experts)


def plan_policy(policy: Policy, world: World, past: FloatArray, previous: Placement | None, seed: int) -> Placement:
    """The policy's plan from `past`, tokens float64 (steps, L, E), the newest step last.

    `previous` is the placement to start from, within the policy's limits; None for a plan made anew. The steps are
    added up to `policy.pieces` windows of consecutive steps, as equal in number as they can be.
    """
    edges = np.arange(min(policy.pieces, len(past)) + 1) * len(past) // min(policy.pieces, len(past))
    windows = np.stack([past[begin:end].sum(axis=0) for begin, end in pairwise(edges)])
    if policy.planner == "greedy":
        from evenmoe.planner.greedy import plan_greedy  # not at the top: importing numba takes 0.3 s

        counts = {"num_nodes": world.num_nodes, "num_groups": policy.num_groups}
        return plan_greedy(windows, num_ranks=world.num_ranks, num_slots=policy.num_slots, **counts)
    return plan(
        windows[0] if len(windows) == 1 else windows,
        num_ranks=world.num_ranks,
        num_slots=policy.num_slots,
        num_nodes=world.num_nodes,
        num_groups=policy.num_groups,
        previous=previous,
        max_copies=None if previous is None else policy.max_copies,
        target_par=None if previous is None else policy.target_par,
        rule=policy.plan_for,
        seed=seed,
    )


def check_policy(policy: Policy, world: World, num_experts: int) -> None:
    """Plan one layer of equal loads, so that what the planner refuses is refused before the replay begins.

    Raises:
        ConstraintError: names the policy and what its planner says.
    """
    if policy.kind == "identity":
        return
    first = None if policy.start == "scratch" else first_placement(policy, world, 1, num_experts)
    try:
        plan_policy(policy, world, np.ones((1, 1, num_experts)), first, 0)
    except ConstraintError as error:
        raise ConstraintError(
            "policy",
            repr(policy.name),
            f"must be one that can be planned, and {error.argument} {error.rule}",
            error.fix,
        ) from error
