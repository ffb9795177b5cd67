"""Plans for decode, where a rank reads the weights of every expert that has any row, and rows are few.

What a rank costs in a step is `weight_rows` for each expert that it has rows of, and one for each row. A load says how
likely a token picks an expert, and so what the expert costs in a step of so many tokens; these costs are planned in
place of tokens. A replica would read the same weights once more, so experts have replicas only under a rule that may
leave them idle (`rules/batch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray, as_load, slots_by_rank
from evenmoe.placement import Placement
from evenmoe.planner.options import PlanOptions, Shape, whole_number
from evenmoe.rules import RULES
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.split_batch import checked_weight_rows

# Rows that take an H100 as long as one expert's weights: bandwidth and arithmetic of DeepSeek-V3's and Mixtral's shapes
# give 150 to 295, those of an H20 30 to 40.
WEIGHT_ROWS = 150
# Steps that are drawn to compare two plans. Both see the same ones, so that what differs is the plans alone.
_STEPS = 64
# What these steps must cost less than under the plan for tokens: smaller gains did not come again on other requests of
# gpt-oss-20b and DeepSeek-V2-Lite, where they became losses of up to 0.2 %.
_LEAST_GAIN = 0.005


class Step(NamedTuple):
    """A decode step: tokens over all ranks, the experts of each token, the rows that an expert's weights are worth."""

    num_tokens: int
    top_k: int
    weight_rows: int


def step_of(options: PlanOptions, shape: Shape) -> Step:
    """The step that is asked for.

    Raises:
        MissingArgumentError: `tokens_per_step` or `top_k` was not given.
        ConstraintError: numbers that cannot be, or options that do not go with decode.
    """
    for name in ("tokens_per_step", "top_k"):
        if getattr(options, name) is None:
            rule, fix = "must say what a decode step is", f"pass {name}=, or leave the objective out"
            raise MissingArgumentError(name, "not given", rule, fix)
    if options.target_par is not None:
        rule = "is a figure of tokens, which decode does not plan"
        raise ConstraintError("target_par", options.target_par, rule, "bound the copies with max_copies instead")
    rule = RULES.get(options.rule)
    if shape.num_slots > shape.num_experts and rule.plan_for != "batch":
        raise ConstraintError(
            "rule",
            f"{rule.name!r} with {shape.num_slots} slots for {shape.num_experts} experts",
            'must be "batch" to plan replicas for decode, since every replica with a share is read',
            f"use the batch rule with weight_rows, or {shape.num_experts} slots",
        )
    weights = WEIGHT_ROWS if options.weight_rows is None else options.weight_rows
    return Step(
        whole_number("tokens_per_step", options.tokens_per_step, 1),
        whole_number("top_k", options.top_k, 1),
        checked_weight_rows(weights),
    )


def plan_decode(
    tokens: FloatArray, shape: Shape, options: PlanOptions, plan: Callable[[FloatArray, PlanOptions], Placement]
) -> Placement:
    """The placement for a decode step of these options.

    Without replicas a layer has the plan for tokens, unless steps drawn from the load cost less by half a percent.

    Args:
        tokens: of logical experts, float64 (L, E) or windows (T, L, E), empty windows left out.
        shape: of the plan.
        options: checked, their objective decode.
        plan: what plans loads in this shape.

    Raises:
        ConstraintError: an expert with more of the load than it can have when each token picks it once.
    """
    step = step_of(options, shape)
    chances = chances_of(tokens, step.top_k)
    if shape.num_slots > shape.num_experts:
        return plan(expected_costs(chances, step), options)
    alone = replace(options, rule="even")  # where there is nothing to choose, all rules are one
    found = plan(peak_costs(chances, step, shape.num_ranks), alone)
    if options.previous is not None:
        return found
    usual = plan(tokens, alone)
    costs, usual_costs = (drawn_costs(chances, step, each, options.seed) for each in (found, usual))
    better = costs < (1 - _LEAST_GAIN) * usual_costs
    slots = np.where(better[:, None], found.slot_to_expert, usual.slot_to_expert)
    return Placement(slots, shape.num_ranks, num_experts=shape.num_experts, rank_sizes=found.rank_sizes)


def chances_of(tokens: FloatArray, top_k: int) -> FloatArray:
    """How likely a token picks each expert, of the shape of `tokens` (…, E); 0 in layers without tokens.

    Raises:
        ConstraintError: one would be picked more than once by a token.

    >>> chances_of(np.array([[3.0, 1.0, 0.0]]), top_k=1).tolist()
    [[0.75, 0.25, 0.0]]
    """
    total = tokens.sum(axis=-1, keepdims=True)
    chances = np.divide(tokens * top_k, total, out=np.zeros_like(tokens), where=total > 0)
    highest = float(chances.max())
    if highest > 1 + 1e-9:  # the division's rounding is far below
        raise ConstraintError(
            "top_k",
            top_k,
            f"must be at most {int(top_k / highest)}, as one expert has {highest / top_k:.1%} of a layer's load, and a "
            "token picks an expert once",
            "pass the experts that each token picks",
        )
    return np.minimum(chances, 1.0)


def expected_costs(chances: FloatArray, step: Step) -> FloatArray:
    """What each expert costs the rank that has all its rows, in rows: the mean over steps.

    Half of two tokens: 1 row, and weights of 8 rows in three of four steps:

    >>> expected_costs(np.array([0.5]), Step(num_tokens=2, top_k=1, weight_rows=8)).tolist()
    [7.0]
    """
    read = -np.expm1(step.num_tokens * _log(1.0 - chances))
    return step.weight_rows * read + step.num_tokens * chances


def peak_costs(chances: FloatArray, step: Step, num_ranks: int) -> FloatArray:
    """What each expert adds to the costliest of the ranks: its mean cost, and more the more that varies.

    The mean of the highest of G sums is at most (1 / s) log Σ exp(s · sum) for any s > 0, in the mean over steps. For
    independent experts the logarithm is a sum over those of the rank, whose terms are these:
    (1 / s) log E exp(s · cost), with n ~ Binomial(T, q) rows and cost = weights · [n > 0] + n. The bound is least near
    s = √(2 log G) / σ, σ² being a rank's mean variance (Boucheron, Lugosi and Massart, Concentration Inequalities,
    2013, §2.5). As s goes to 0 they become `expected_costs`, which are returned where nothing varies.
    """
    number, weights = step.num_tokens, float(step.weight_rows)
    never = number * _log(1.0 - chances)  # logarithms
    read = -np.expm1(never)
    rows = number * chances
    variance = weights**2 * read * (1 - read) + rows * (1 - chances) + 2 * weights * rows * (1 - read)
    total = variance.sum(axis=-1, keepdims=True) / num_ranks
    if num_ranks == 1 or not total.all():
        return expected_costs(chances, step)
    scale = np.sqrt(2 * np.log(num_ranks) / total)
    some = number * np.log1p(chances * np.expm1(scale))  # of E exp(s n)
    # E exp(s cost) = P(0) + e^(s weights) (E exp(s n) − P(0)), whose last difference is P(0) less than what it is of.
    reading = scale * weights + some + _log(-np.expm1(never - some))
    return np.logaddexp(never, reading) / scale


def drawn_costs(chances: FloatArray, step: Step, placement: Placement, seed: int) -> FloatArray:
    """The mean over drawn steps of what the costliest rank costs, float64 (L,), in a placement without replicas.

    Each expert's rows are drawn by themselves; of windows (T, L, E) each has its part of the steps.
    """
    rows = np.take_along_axis(_draw(chances, step, seed), placement.slot_to_expert[None], axis=-1)
    return _peaks(rows, placement, step)


def mean_step_costs(load: npt.ArrayLike, placement: Placement, options: PlanOptions) -> FloatArray:
    """As `drawn_costs`, float64 (L,), of any placement and of loads (L, E) or (T, L, E).

    Where experts have replicas, each step is split by the batch rule with the weights of the options.

    Two ranks, and both experts are in every step of 10 tokens that pick both:

    >>> options = PlanOptions(2, 2, objective="decode", tokens_per_step=10, top_k=2)
    >>> mean_step_costs(np.array([[5.0, 5.0]]), Placement([[0, 1]], num_ranks=2), options).tolist()
    [160.0]
    """
    shape = Shape(placement.num_experts, placement.num_ranks, placement.num_experts, 1, 1)
    step = step_of(options, shape)
    rows = _draw(chances_of(as_load(load), step.top_k), step, options.seed)
    return _peaks(BatchRule(step.weight_rows).slot_loads(rows, placement), placement, step)


def _draw(chances: FloatArray, step: Step, seed: int) -> FloatArray:
    """Rows of each expert in drawn steps, float64 (N, L, E)."""
    windows = chances if chances.ndim == 3 else chances[None]
    each = windows[np.arange(_STEPS) * len(windows) // _STEPS]
    # The same numbers for every layer, which then does not depend on the others.
    layers = [np.random.default_rng(seed).binomial(step.num_tokens, layer) for layer in each.swapaxes(0, 1)]
    return np.stack(layers, axis=1).astype(np.float64)


def _peaks(rows: FloatArray, placement: Placement, step: Step) -> FloatArray:
    """(L,): the mean over steps of what the costliest rank costs, from the rows of each slot (N, L, S)."""
    costs = slots_by_rank(rows + step.weight_rows * (rows > 0), placement.rank_sizes)
    return costs.max(axis=-1).mean(axis=0)


def _log(values: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.log(values)
