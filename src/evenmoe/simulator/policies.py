"""Policies: which placement is in use at every step, and by which rule tokens choose among its replicas.

    NAME[:key=value,...]

    identity  the default placement for ever: slot s holds expert s mod E, in the fewest slots that the ranks can share
    static    planned once, when the first window is over
    greedy    the published greedy planner (DeepSeek's), planned anew at every refresh
    evenmoe   evenmoe's plan at every refresh; the first one made anew, the others from the placement in use
    oracle    planned on each step itself, which nobody can; its copies cost nothing

Any other planner (`evenmoe.planner`), a user's own as py:module:function included, is a policy as greedy and
evenmoe are. A policy that plans starts with the default placement, in its own number of slots, and sees only steps that
are over.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.planner import PLANNERS, Planner
from evenmoe.planner.judging import without_order
from evenmoe.planner.options import PlanOptions
from evenmoe.planner.plan import names, plan_with, takes
from evenmoe.rules import RULES
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.decode import DECODE_KEYS, read_decode, step_options
from evenmoe.simulator.policy_text import PolicyText, called

_ADDS_UP = ("greedy",)  # planners that look at the sum of windows alone, so that pieces would be ignored


@dataclass(frozen=True)
class Policy:
    """The default placement for ever; the base of all others.

    Attributes:
        name: as written.
        rule: by which its tokens choose among replicas.
        num_slots: S.
        window: past steps that a plan is made from, at most.
        own_of: name of the engine whose own balancer it is, "" of none.
    """

    name: str
    rule: Rule
    num_slots: int
    window: int = 1
    own_of: str = ""

    sees_the_step: ClassVar[bool] = False  # and plans before every step from its own load, with free copies

    @classmethod
    def keys(cls, planner: str | Planner) -> tuple[str, ...]:
        """What may be given after the colon."""
        return ("rule",)

    @classmethod
    def read(cls, text: PolicyText, cluster: Cluster, num_experts: int) -> Policy:
        """The policy with all its choices made."""
        return cls(text.whole, text.rule("rule", "rank"), cluster.fewest_slots(num_experts))

    @property
    def description(self) -> str:
        """One sentence: planner, rule, when it is refreshed."""
        return f"The default placement for ever, expert s mod E in slot s, {self._choice}."

    @property
    def _choice(self) -> str:
        weights = self.rule.weight_rows if isinstance(self.rule, BatchRule) else 0
        worth = f", an expert's weights being worth {weights} rows" if weights else ""
        return f"replicas chosen by the {self.rule.name} rule{worth}"

    @property
    def first_plan(self) -> int:
        """The step before which the first plan is made from steps that are over; 0 where none ever is."""
        return 0

    def is_due(self, step: int) -> bool:
        """Whether a plan is made before this step, from the steps that are over."""
        return False

    def is_scheduled(self, first: int) -> bool:
        """Whether its plans, the first of the run's being before step `first`, come at the run's interval."""
        return False

    def starts_anew(self, has_planned: bool) -> bool:
        """Whether the next plan takes no account of the placement in use."""
        return True

    @property
    def plan_made_anew(self) -> Hashable | None:
        """What tells a plan made anew from that of another policy at the same step; None where nothing surely does."""
        return None

    def first_placement(self, cluster: Cluster, num_layers: int, num_experts: int) -> Placement:
        """The default placement, which runs before anything is known: slot s holds expert s mod E."""
        slots = np.tile(np.arange(self.num_slots, dtype=np.int32) % num_experts, (num_layers, 1))
        return Placement(slots, cluster.num_ranks, num_experts=num_experts)

    def plan(self, cluster: Cluster, past: FloatArray, previous: Placement | None, seed: int) -> Placement:
        """The plan from `past`, tokens float64 (steps, L, E), the newest step last.

        `previous` is the placement to start from, within the policy's limits; None for a plan made anew.
        """
        return self.first_placement(cluster, *past.shape[1:])


@dataclass(frozen=True)
class Planned(Policy):
    """What all policies that plan have in common.

    Attributes:
        num_groups: expert groups that stay inside nodes; 1 plans across nodes.
        pieces: windows that the past steps are added up to; a plan from more than one looks at how loads vary.
        planner: its name, py:module:function, or a function that is called as `evenmoe.plan` is.
        plan_for: the rule that the plan is made for, or its name.
        in_slot_order: whether replicas are in the order of their slots, as the file of an engine leaves them.
        max_copies: of a layer in a plan that starts from the placement in use; None for no bound.
        target_par: at which such a plan stops copying, or None.
        objective: what the plan makes small, "tokens" or "decode".
        weight_rows: of a plan for decode, rows that an expert's weights are worth; None for tokens.
    """

    num_groups: int = 1
    pieces: int = 1
    planner: str | Planner = "evenmoe"
    plan_for: str | Rule = "even"
    in_slot_order: bool = False
    max_copies: int | None = None
    target_par: float | None = None
    objective: str = "tokens"
    weight_rows: int | None = None

    @classmethod
    def read(cls, text: PolicyText, cluster: Cluster, num_experts: int) -> Policy:
        """See `Policy.read`."""
        slots, groups = text.number("slots"), text.number("groups")
        text.check_slots(slots, groups, cluster, num_experts)
        decode = read_decode(text, *cls._default_rules(text))
        return cls(
            name=text.whole,
            rule=decode.rule,
            num_slots=slots,
            window=text.number("window"),
            num_groups=groups,
            pieces=text.number("pieces"),
            planner=text.find_planner(),
            plan_for=text.rule_name("plan-for", decode.plan_for),
            objective=decode.objective,
            weight_rows=decode.weight_rows,
            in_slot_order=text.engine is not None and not text.engine.keeps_order,
        )

    @classmethod
    def _default_rules(cls, text: PolicyText) -> tuple[str, str | Rule]:
        return "rank", text.given.get("rule", text.standard("rank"))

    @property
    def plan_made_anew(self) -> Hashable | None:
        """See `Policy.plan_made_anew`; a planner of the user's is asked by every policy."""
        if not PLANNERS.is_own(PLANNERS.get(self.planner)):
            return None
        # A rule is planned for as another, so that static and evenmoe's first plan are often one.
        assumed = RULES.get(self.plan_for).plan_for
        seen = self.window, self.pieces, self.objective, self.weight_rows
        return type(self).plan, self.planner, self.num_slots, self.num_groups, *seen, assumed, self.in_slot_order

    def plan(self, cluster: Cluster, past: FloatArray, previous: Placement | None, seed: int) -> Placement:
        """See `Policy.plan`; the steps are added up to `pieces` windows, as equal in number as they can be."""
        edges = np.arange(min(self.pieces, len(past)) + 1) * len(past) // min(self.pieces, len(past))
        windows = np.stack([past[begin:end].sum(axis=0) for begin, end in pairwise(edges)])
        options = PlanOptions(
            num_ranks=cluster.num_ranks,
            num_slots=self.num_slots,
            num_nodes=cluster.num_nodes,
            num_groups=self.num_groups,
            previous=previous,
            max_copies=None if previous is None else self.max_copies,
            target_par=None if previous is None else self.target_par,
            rule=self.plan_for,
            seed=seed,
            **step_options(self.objective, self.weight_rows, cluster, past),
        )
        placement = plan_with(self.planner, windows[0] if len(windows) == 1 else windows, options)
        return without_order(placement) if self.in_slot_order else placement

    @property
    def _plan(self) -> str:
        plan = f"The plan of {called(self.planner)}"
        if self.planner == "greedy":
            plan = "The published greedy plan"
        elif self.planner == "evenmoe":
            plan = f"evenmoe's plan for the {RULES.get(self.plan_for).name} rule"
        plan += " in decode" if self.objective == "decode" else ""
        plan += f" on {self.num_slots} slots"
        return plan + (f" with {self.num_groups} groups kept inside nodes" if self.num_groups > 1 else "")

    @property
    def _past(self) -> str:
        return f"the {self.window} steps before" + (f" as {self.pieces} windows" if self.pieces > 1 else "")


class Static(Planned):
    """Planned once, when the first window is over."""

    @classmethod
    def keys(cls, planner: str | Planner) -> tuple[str, ...]:
        """See `Policy.keys`."""
        return ("rule", "slots", "groups", "window", "pieces", "planner", "plan-for", *DECODE_KEYS)

    @property
    def description(self) -> str:
        """See `Policy.description`."""
        return f"{self._plan}, made once from {self._past} step {self.window}, {self._choice}."

    @property
    def first_plan(self) -> int:
        """See `Policy.first_plan`."""
        return self.window

    def is_due(self, step: int) -> bool:
        """See `Policy.is_due`."""
        return step == self.window


class Oracle(Planned):
    """Planned on each step itself, which nobody can."""

    sees_the_step = True

    @classmethod
    def keys(cls, planner: str | Planner) -> tuple[str, ...]:
        """See `Policy.keys`."""
        return ("rule", "slots", "groups", "planner", "plan-for", *DECODE_KEYS)

    @classmethod
    def _default_rules(cls, text: PolicyText) -> tuple[str, str | Rule]:
        return "batch", "even" if "rule" in text.given else text.standard("even")

    @property
    def description(self) -> str:
        """See `Policy.description`."""
        return f"{self._plan}, made on each step itself with free copies, {self._choice}."


@dataclass(frozen=True)
class Refreshed(Planned):
    """A planner that is asked again and again.

    Attributes:
        first: the step before which the first plan is made.
        refresh: steps between plans.
        start: which plans are made anew: "first" the first one, "scratch" all, "previous" none.
    """

    first: int = 1
    refresh: int = 1
    start: str = "scratch"

    @classmethod
    def keys(cls, planner: str | Planner) -> tuple[str, ...]:
        """See `Policy.keys`; they follow from what the planner takes."""
        found = PLANNERS.get(planner)
        optional = {
            "groups": takes(found, "num_groups"),
            "refresh": True,
            "window": True,
            "pieces": planner not in _ADDS_UP,
            "plan-for": takes(found, "rule"),
            "max-copies": takes(found, "max_copies"),
            "target-par": takes(found, "target_par"),
            "start": takes(found, "previous"),
            "objective": takes(found, "objective"),
            "weight-rows": True,
        }
        return ("rule", "slots", *(key for key, taken in optional.items() if taken))

    @classmethod
    def read(cls, text: PolicyText, cluster: Cluster, num_experts: int) -> Policy:
        """See `Policy.read`."""
        policy, taken = super().read(text, cluster, num_experts), cls.keys(text.find_planner())
        start = text.word("start", ("first", "previous", "scratch"), "first" if "start" in taken else "scratch")
        limits = [key for key in ("max-copies", "target-par") if key in text.given]
        if start == "scratch" and limits:
            text.fail(f"has {limits[0]} with start=scratch", "leave out one of them: a limit needs a placement to keep")
        # Keeping up with a drift of 15 % takes DeepSeek-V3's layers 28 to 35 copies of 288 slots to a PAR of 1.01. A
        # planner that takes any option (**options) need not know this one: it is bounded where it is told to be.
        asked = "max-copies" in text.given or names(PLANNERS.get(text.find_planner()), "max_copies")
        bounded = start != "scratch" and "max-copies" in taken and asked
        return replace(
            policy,
            max_copies=text.number("max-copies", max(1, policy.num_slots // 8)) if bounded else None,
            target_par=text.real("target-par") if "target-par" in text.given else None,
            first=text.number("refresh" if "refresh" in text.given else "first"),
            refresh=text.number("refresh"),
            start=start,
        )

    @property
    def description(self) -> str:
        """See `Policy.description`."""
        begin = "" if self.start == "scratch" else ", starting from the placement in use"
        begin += " but for the first time" if self.start == "first" else ""
        begin += "" if self.max_copies is None else f", at most {self.max_copies} copies a layer"
        begin += "" if self.target_par is None else f", down to a PAR of {self.target_par:g}"
        after = "" if self.first == self.refresh else f" from step {self.first} on"
        return f"{self._plan}, made every {self.refresh} steps{after} from {self._past}{begin}, {self._choice}."

    @property
    def first_plan(self) -> int:
        """See `Policy.first_plan`."""
        return self.first

    def is_due(self, step: int) -> bool:
        """See `Policy.is_due`."""
        return step >= self.first and (step - self.first) % self.refresh == 0

    def is_scheduled(self, first: int) -> bool:
        """See `Policy.is_scheduled`."""
        return self.first == first and self.refresh != self.first

    def starts_anew(self, has_planned: bool) -> bool:
        """See `Policy.starts_anew`."""
        return self.start == "scratch" or (self.start == "first" and not has_planned)


def default_policies(num_slots: int, fewest: int, *, once: bool) -> tuple[str, ...]:
    """What is compared where nobody says: every kind, and what rearranging does without a slot more than there must be.

    Args:
        num_slots: S of policies that do not say.
        fewest: the slots that hold every expert.
        once: whether a single plan is made in the replay, so that `static` would repeat evenmoe's.

    >>> default_policies(40, 32, once=True)[:3]
    ('identity', 'greedy', 'evenmoe:slots=32')
    """
    without = (f":slots={fewest}",) if num_slots > fewest else ()
    static = () if once else ("static", *(f"static{slots}" for slots in without))
    rearranged = (f"evenmoe{slots}" for slots in without)
    by_rule = tuple(f"evenmoe:rule={rule}" for rule in ("rank", "occurrence", "batch"))
    return ("identity", *static, "greedy", *rearranged, *by_rule, "oracle")


_SCHEDULES: dict[str, type[Policy]] = {"identity": Policy, "static": Static, "oracle": Oracle}


def check_policy(policy: Policy, cluster: Cluster, num_experts: int) -> None:
    """Plan one layer of equal loads, so that what the planner refuses is refused before the replay begins.

    Raises:
        ConstraintError: names the policy and what its planner says.
    """
    first = None if policy.starts_anew(has_planned=True) else policy.first_placement(cluster, 1, num_experts)
    try:
        policy.plan(cluster, np.ones((1, 1, num_experts)), first, 0)
    except ConstraintError as error:
        rule = f"must be one that can be planned, and its `{error.argument}` is {error.value}, which {error.rule}"
        raise ConstraintError("policy", repr(policy.name), rule, error.fix) from error


def read_policy(text: PolicyText, cluster: Cluster, num_experts: int) -> Policy:
    """The policy that a text is.

    Raises:
        ConstraintError: names the policy, the key and what it may be.
    """
    schedule = _SCHEDULES.get(text.kind, Refreshed) if text.planner is None else Refreshed
    if schedule is Refreshed and text.planner is None and not text.kind.startswith("py:") and text.kind not in PLANNERS:
        names = ("identity", "static", *PLANNERS, "oracle")
        text.fail(f"begins with {text.kind!r}, which is no policy", f"use one of {', '.join(names)}, or file:PATH")
    try:
        keys = schedule.keys(text.planner or text.kind)
    except ConstraintError as error:
        raise ConstraintError("policy", repr(text.whole), error.rule, error.fix) from error
    text.read_options(keys)
    return schedule.read(text, cluster, num_experts)
