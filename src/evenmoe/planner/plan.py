"""`plan`: the one entry to every planner."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, as_load, within_range
from evenmoe.placement import Placement, layers_of
from evenmoe.planner.options import PlanOptions, Shape
from evenmoe.rules.catalogue import RULES
from evenmoe.rules.rule import Rule


def plan(
    load: npt.ArrayLike,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    previous: Placement | None = None,
    max_copies: int | None = None,
    target_par: float | None = None,
    rule: str | Rule = "even",
    seed: int = 0,
) -> Placement:
    """Choose replica counts and ranks for every expert, so that the busiest rank has as little to do as possible.

    Every expert gets a slot, no two replicas of an expert share a rank (unless there are more slots than experts
    times ranks), and every rank has the same number of slots. The same arguments give the same placement.

    Args:
        load: tokens per logical expert, (L, E); or windows (T, L, E): then the mean over windows of the
            peak-to-average load is made small, for loads like the ones recorded, not for their sum. A window in which
            a layer has no tokens says nothing about that layer: it is planned as if the window were not there.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        num_nodes: nodes that share the ranks evenly, in rank order.
        num_groups: expert groups, equal runs of consecutive ids. With more than one node, all replicas of a
            group's experts stay inside one node (DeepSeek's group-limited routing). 1 plans across nodes.
        previous: the placement in use; the plan starts from it and copies as few experts as it can. Where groups stay
            inside nodes, it must have them so.
        max_copies: at most so many copies per layer, counted as `count_copies` does. Needs `previous`. More never give
            a worse plan: a lower peak of the load, for "batch" of the drifted loads that it is planned for.
        target_par: stop copying in a layer once its peak-to-average load is at most this. Needs `previous`.
        rule: what decides how tokens divide over an expert's replicas: "even" (equal shares), "rank", "token",
            "occurrence", "batch", or one of your own. "token" and "occurrence" are planned as "even": by occurrence
            the shares are even with few tokens already, by token in the limit of many (T tokens on each rank load the
            first T mod count replicas of an expert by one more per rank, so one token a rank all goes to replica 0,
            whatever the plan).
        seed: of the search's random choices, 0 or more.

    Returns:
        The placement, of L layers.

    Raises:
        ConstraintError: counts that cannot work (the text names the nearest that do), or arguments that do not
            go together.

    Two ranks with two slots each: expert 0 is split, and either rank computes 3 + 1 = 4 tokens:

    >>> placement = plan([[6, 1, 1]], num_ranks=2, num_slots=4)
    >>> placement.num_replicas.tolist()
    [[2, 1, 1]]
    """
    options = PlanOptions(num_ranks, num_slots, num_nodes, num_groups, previous, max_copies, target_par, rule, seed)
    tokens = _without_empty(within_range(as_load(load)))
    options, shape = options.checked(*tokens.shape[-2:])
    assumed = RULES.get(rule).plan_for
    if tokens.ndim == 3 and previous is not None:
        return _plan_each_history(tokens, shape, assumed, previous, options.max_copies, target_par, options.seed)
    return _plan(tokens, shape, assumed, previous, options.max_copies, target_par, options.seed)


def _without_empty(tokens: FloatArray) -> FloatArray:
    """Windows (T, L, E) without those in which nothing at all was recorded; one of them is kept if all are so."""
    if tokens.ndim == 2:
        return tokens
    recorded = tokens.any(axis=(1, 2))
    return tokens[recorded] if recorded.any() else tokens[:1]


def _plan_each_history(
    tokens: FloatArray,
    shape: Shape,
    rule: str,
    previous: Placement,
    max_copies: int | None,
    target_par: float | None,
    seed: int,
) -> Placement:
    """Plan layers with tokens in the same windows together, from those windows alone.

    The means over windows that decide about copies would otherwise count a window without tokens as an even one.
    """
    seen = tokens.any(axis=2).T
    seen[~seen.any(axis=1)] = True
    histories, which = np.unique(seen, axis=0, return_inverse=True)
    if len(histories) == 1:
        return _plan(tokens, shape, rule, previous, max_copies, target_par, seed)
    slots, order = np.empty_like(previous.slot_to_expert), np.empty_like(previous.replica_index)
    for number, windows in enumerate(histories):
        layers = np.flatnonzero(which.reshape(-1) == number)
        in_use = layers_of(previous, layers)
        part = _plan(tokens[windows][:, layers], shape, rule, in_use, max_copies, target_par, seed)
        slots[layers], order[layers] = part.slot_to_expert, part.replica_index
    return Placement(slots, shape.num_ranks, num_experts=shape.num_experts, replica_index=order)


def _plan(
    tokens: FloatArray,
    shape: Shape,
    rule: str,
    previous: Placement | None,
    max_copies: int | None,
    target_par: float | None,
    seed: int,
) -> Placement:
    """The planner that the checked arguments call for."""
    if rule in ("rank", "batch"):
        from evenmoe.planner.rule_aware import plan_for_rule

        return plan_for_rule(tokens, shape, rule, previous, max_copies, seed)
    if previous is not None:
        from evenmoe.planner.incremental import plan_incremental

        nodes = (shape.num_nodes, shape.num_groups) if shape.is_hierarchical else (1, 1)
        slots = plan_incremental(tokens, previous, max_copies, target_par, seed, *nodes)
    elif shape.is_hierarchical:
        from evenmoe.planner.hierarchical import plan_hierarchical

        slots = plan_hierarchical(tokens, shape.num_ranks, shape.num_slots, shape.num_nodes, shape.num_groups, seed)
    elif tokens.ndim == 3:
        from evenmoe.planner.windows import plan_windows

        slots = plan_windows(tokens, shape.num_ranks, shape.num_slots, seed)
    else:
        from evenmoe.planner.static import plan_static

        slots = plan_static(tokens, shape.num_ranks, shape.num_slots, seed)
    return Placement(slots, shape.num_ranks, num_experts=shape.num_experts)
