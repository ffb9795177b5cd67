"""Policies for decode: `objective=decode` of the plan, and `weight-rows` of the plan and of the batch rule's split."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.planner.decode import WEIGHT_ROWS
from evenmoe.planner.options import OBJECTIVES
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.policy_text import PolicyText

DECODE_KEYS = ("objective", "weight-rows")


class DecodeChoice:
    """What a policy's text says of decode.

    Attributes:
        rule: by which its tokens choose among replicas, with weights if it counts them.
        plan_for: the rule that the plan is made for where the text does not say.
        objective: "tokens" or "decode".
        weight_rows: of the plan; None for tokens.
    """

    def __init__(self, rule: Rule, plan_for: str | Rule, objective: str, weight_rows: int | None) -> None:
        self.rule, self.plan_for = rule, plan_for
        self.objective, self.weight_rows = objective, weight_rows


def read_decode(text: PolicyText, rule: str, plan_for: str | Rule) -> DecodeChoice:
    """What is chosen where `rule` and `plan_for` are the defaults of policies for tokens.

    For decode both are the batch rule, unless an engine has another.

    Raises:
        ConstraintError: weights that nothing of the policy reads.
    """
    objective = text.word("objective", OBJECTIVES, "tokens")
    if objective == "decode":
        rule = "batch"
        plan_for = text.given.get("rule", text.standard(rule))
    chosen = text.rule("rule", rule)
    weights = text.number("weight-rows", WEIGHT_ROWS)
    counts = type(chosen) is BatchRule
    if "weight-rows" in text.given and objective == "tokens" and not counts:
        text.fail("has weight-rows with neither objective=decode nor rule=batch", "add one of them, or leave it out")
    if counts and (objective == "decode" or "weight-rows" in text.given):
        chosen = BatchRule(weights)
    return DecodeChoice(chosen, plan_for, objective, weights if objective == "decode" else None)


class StepOptions(TypedDict, total=False):
    """Those of `PlanOptions` that say what a decode step is."""

    objective: str
    tokens_per_step: int
    top_k: int
    weight_rows: int | None


def step_options(objective: str, weight_rows: int | None, cluster: Cluster, past: FloatArray) -> StepOptions:
    """The step that a plan from `past`, tokens (steps, L, E), is for: the replay's own; none for tokens.

    A token picks as many experts as the fullest layer says, and no more than leave each expert at most one pick.

    >>> past = np.array([[[40.0, 40.0, 30.0, 18.0]]])
    >>> step_options("decode", 150, Cluster(num_ranks=2, tokens_per_rank=32), past)["top_k"]
    2
    """
    if objective == "tokens":
        return {}
    tokens = cluster.num_ranks * cluster.tokens_per_rank
    picks = int(-(-past.sum(axis=2).max() // tokens))
    total = past.sum(axis=0)
    highest = total.max(axis=1)
    most = (total.sum(axis=1)[highest > 0] / highest[highest > 0]).min(initial=np.inf)
    top_k = max(1, int(min(picks, most)))
    return {"objective": objective, "tokens_per_step": tokens, "top_k": top_k, "weight_rows": weight_rows}
