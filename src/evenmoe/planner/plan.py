"""`plan`, evenmoe's own planner, and `plan_with`, the one entry to all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, signature

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray, as_load, count_copies, within_range
from evenmoe.placement import Placement
from evenmoe.planner import PLANNERS, Planner
from evenmoe.planner.options import PlanOptions, Shape, check_placement, sizes_of
from evenmoe.planner.slots import Slots, histories
from evenmoe.registry import blaming
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule

# What a planner need not look at: its plan is another than it could be, but none that breaks what was asked for.
_HINTS = ("rule", "seed")


def plan(
    load: npt.ArrayLike,
    *,
    num_ranks: int,
    num_slots: int | Sequence[int],
    num_nodes: int = 1,
    num_groups: int = 1,
    previous: Placement | None = None,
    max_copies: int | None = None,
    target_par: float | None = None,
    rule: str | Rule = "even",
    seed: int = 0,
    dead_ranks: Collection[int] = (),
    objective: str = "tokens",
    tokens_per_step: int | None = None,
    top_k: int | None = None,
    weight_rows: int | None = None,
) -> Placement:
    """Choose replica counts and ranks for every expert, so that the busiest rank has as little to do as possible.

    Every expert gets a slot, no two replicas of an expert share a rank (unless there are more slots than experts
    times ranks), and every rank has the number of slots that `num_slots` says. The same arguments give the same
    placement.

    Args:
        load: tokens per logical expert, (L, E); or windows (T, L, E): then the mean over windows of the
            peak-to-average load is made small, for loads like the ones recorded, not for their sum. A window in which
            a layer has no tokens says nothing about that layer: it is planned as if the window were not there.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G; or the slots of each rank, 0 or more, at least E together. Ranks
            of different sizes are planned for a rule whose shares are even, and with groups across nodes.
        num_nodes: nodes that share the ranks evenly, in rank order.
        num_groups: expert groups, equal runs of consecutive ids. With more than one node, all replicas of a
            group's experts stay inside one node (DeepSeek's group-limited routing). 1 plans across nodes.
        previous: the placement in use; the plan starts from it and copies as few experts as it can. Where groups stay
            inside nodes, it must have them so. It may have more or fewer ranks and slots: rank r is the same rank, and
            keeps what it has room for.
        max_copies: at most so many copies per layer, counted as `count_copies` does. Needs `previous`. More never give
            a worse plan: a lower peak of the load, for "batch" of the drifted loads that it is planned for.
        target_par: stop copying in a layer once its peak-to-average load is at most this. Needs `previous`.
        rule: what decides how tokens divide over an expert's replicas: "even" (equal shares), "rank", "token",
            "occurrence", "batch", or one of your own. "token" and "occurrence" are planned as "even": by occurrence
            the shares are even with few tokens already, by token in the limit of many (T tokens on each rank load the
            first T mod count replicas of an expert by one more per rank, so one token a rank all goes to replica 0,
            whatever the plan).
        seed: of the search's random choices, 0 or more.
        dead_ranks: ranks that get no expert; their slots are lost, and the others keep their numbers. What they held in
            `previous` is copied from elsewhere.
        objective: "tokens", or "decode": what the costliest rank reads and computes in a step of few tokens. Experts
            have replicas then only with rule="batch" and for `evenmoe.rules.batch.BatchRule(weight_rows=…)`, which
            leaves them idle where they would not pay; without replicas the plan is for any rule.
        tokens_per_step: tokens of a decode step over all ranks, 1 or more; decode needs it.
        top_k: experts that each token picks; decode needs it.
        weight_rows: rows that take a rank as long to compute as the weights of one expert take to read; by default 150,
            about an H100's. For decode alone.

    Returns:
        The placement, of L layers.

    Raises:
        ConstraintError: counts that cannot work (the text names the nearest that do), or arguments that do not
            go together.
        MissingArgumentError: decode without `tokens_per_step` or `top_k`.

    Two ranks with two slots each: expert 0 is split, and either rank computes 3 + 1 = 4 tokens:

    >>> placement = plan([[6, 1, 1]], num_ranks=2, num_slots=4)
    >>> placement.num_replicas.tolist()
    [[2, 1, 1]]

    Rank 1 died; what it held goes to the others:

    >>> plan([[6, 1, 1]], num_ranks=3, num_slots=6, dead_ranks=[1])
    Placement(layers=1, experts=3, slots=4, ranks=3, rank_sizes=[2, 0, 2])

    Steps of 100 tokens read experts 0 to 3. With the fewest tokens on the busiest rank, 70, the other rank reads three
    experts and costs 3 × 150 + 30 rows. With two on either rank the costliest costs 2 × 150 + 80:

    >>> load, world = [[70, 10, 10, 10, 0, 0]], {"num_ranks": 2, "num_slots": 6}
    >>> plan(load, **world).slot_to_expert.tolist()
    [[0, 4, 5, 1, 2, 3]]
    >>> plan(load, **world, objective="decode", tokens_per_step=100, top_k=1).slot_to_expert.tolist()
    [[0, 3, 5, 1, 2, 4]]
    """
    given = (num_ranks, num_slots, num_nodes, num_groups, previous, max_copies, target_par, rule, seed, dead_ranks)
    options = PlanOptions(*given, objective, tokens_per_step, top_k, weight_rows)
    tokens = _without_empty(within_range(as_load(load)))
    options, shape = options.checked(*tokens.shape[-2:])
    if options.objective == "decode":
        from evenmoe.planner.decode import plan_decode

        return plan_decode(tokens, shape, options, lambda costs, changed: _plan(costs, shape, changed))
    return _plan(tokens, shape, options)


def _plan(tokens: FloatArray, shape: Shape, options: PlanOptions) -> Placement:
    """The placement of checked options, which keeps the busiest rank's `tokens` few."""
    previous = options.previous
    if shape.rank_sizes is not None or (previous is not None and previous.rank_sizes != sizes_of(shape)):
        from evenmoe.planner.elastic import plan_elastic

        slots = plan_elastic(tokens, shape, options)
        return Placement(slots, shape.num_ranks, num_experts=shape.num_experts, rank_sizes=sizes_of(shape))
    if previous is None:
        slots = _plan_anew(tokens, shape, options)
    else:
        slots = _plan_each_history(tokens, shape, options, Slots(previous.slot_to_expert, previous.replica_index))
    return Placement(slots.experts, shape.num_ranks, num_experts=shape.num_experts, replica_index=slots.given_index)


def _without_empty(tokens: FloatArray) -> FloatArray:
    """Windows (T, L, E) without those in which nothing at all was recorded; one of them is kept if all are so."""
    if tokens.ndim == 2:
        return tokens
    recorded = tokens.any(axis=(1, 2))
    return tokens[recorded] if recorded.any() else tokens[:1]


# The planners are imported where they are called: each brings compiled kernels, and importing numba takes 0.3 s.


def _plan_anew(tokens: FloatArray, shape: Shape, options: PlanOptions) -> Slots:
    assumed = RULES.get(options.rule).plan_for
    if assumed != "even":
        from evenmoe.planner.rule_aware import plan_for_rule

        return plan_for_rule(tokens, shape, assumed, options.seed)
    if shape.is_hierarchical:
        from evenmoe.planner.hierarchical import plan_hierarchical

        return Slots(plan_hierarchical(tokens, shape, options.seed))
    from evenmoe.planner.static import plan_static
    from evenmoe.planner.windows import plan_windows

    plan_even = plan_windows if tokens.ndim == 3 else plan_static
    return Slots(plan_even(tokens, shape.num_ranks, shape.num_slots, options.seed))


def _improve_used(tokens: FloatArray, shape: Shape, options: PlanOptions, used: Slots) -> Slots:
    assumed = RULES.get(options.rule).plan_for
    if assumed != "even":
        from evenmoe.planner.rule_aware import improve_for_rule

        return improve_for_rule(tokens, shape, assumed, used, options.max_copies, options.seed)
    from evenmoe.planner.incremental import plan_incremental

    limits = (options.max_copies, options.target_par, options.seed)
    return Slots(plan_incremental(tokens, used.experts, shape, *limits))


def _plan_each_history(tokens: FloatArray, shape: Shape, options: PlanOptions, used: Slots) -> Slots:
    """Plan layers with tokens in the same windows together, from those windows alone."""
    if tokens.ndim == 2:
        return _improve_used(tokens, shape, options, used)
    experts, index = np.empty_like(used.experts), np.empty_like(used.experts)
    for recorded, layers in histories(tokens):
        part = _improve_used(recorded, shape, options, used.of_layers(layers))
        experts[layers], index[layers] = part.experts, part.replica_index
    return Slots(experts, index)


def takes(planner: Planner, option: str) -> bool:
    """Whether the planner's signature has this option of `evenmoe.plan`.

    >>> takes(PLANNERS.get("evenmoe"), "previous"), takes(PLANNERS.get("greedy"), "previous")
    (True, False)
    """
    return _taken(_parameters(planner), option)


def _taken(parameters: Mapping[str, Parameter] | None, option: str) -> bool:
    if parameters is None:  # only a call can tell
        return True
    return option in parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())


def names(planner: Planner, option: str) -> bool:
    """Whether the planner's signature has this option by its name, so that it surely does something with it.

    >>> names(PLANNERS.get("evenmoe"), "previous"), names(lambda load, **options: None, "previous")
    (True, False)
    """
    return option in (_parameters(planner) or ())


def _parameters(planner: Planner) -> Mapping[str, Parameter] | None:
    try:
        return signature(planner).parameters
    except (TypeError, ValueError):  # of a builtin
        return None


def plan_with(planner: str | Planner, load: npt.ArrayLike, options: PlanOptions) -> Placement:
    """Plan with the planner of that name, or with this function, and check what it returns.

    Args:
        planner: a name in `PLANNERS`, py:module:function, or a function that is called as `evenmoe.plan` is.
        load: tokens per logical expert, (L, E), or windows (T, L, E).
        options: all are given to the planner that it takes. One that it does not take is an error where the plan would
            break it; the rule and the seed are left out.

    Raises:
        ConstraintError: no such planner, options that cannot work or that it does not take, or a plan that is no
            placement of the counts asked for, tears a group, or makes more copies than were allowed.

    >>> plan_with("greedy", [[6, 1, 1]], PlanOptions(num_ranks=2, num_slots=4)).slot_to_expert.tolist()
    [[0, 1, 0, 2]]
    """
    tokens = as_load(load)
    options, shape = options.checked(*tokens.shape[-2:])
    found, name = PLANNERS.get(planner), planner if isinstance(planner, str) else repr(planner)
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    parameters = _parameters(found)  # once, since a signature takes longer than all the rest here
    for option in [option for option in given if not _taken(parameters, option)]:
        value = given.pop(option)
        needless = not shape.is_hierarchical if option in ("num_nodes", "num_groups") else value in (None, (), "tokens")
        if not needless and option not in _HINTS:
            raise ConstraintError(
                "planner", f"{name}, which takes no `{option}`", f"must take it to plan with {value}", "leave it out"
            )
    with blaming("planner", name, PLANNERS.is_own(found)):
        placement = found(tokens.copy(), **given)  # which a user's planner may write to
    check_placement(placement, tokens.shape[-2], shape, "planner", f"{name}, whose plan is ", "correct the planner")
    if options.previous is not None and options.max_copies is not None:
        copies = int(count_copies(options.previous, placement).max())
        if copies > options.max_copies:
            made = f"{name}, whose plan makes {copies} copies in one layer"
            raise ConstraintError(
                "planner", made, f"must make at most {options.max_copies} of them", "correct the planner"
            )
    return placement
