"""Policies: what `--policy` means.

    NAME[:key=value,...]

    identity  slot s holds expert s mod E for ever, in the fewest slots that the ranks can share
    static    planned once, when the first window is over
    greedy    the published greedy planner (DeepSeek's), planned anew at every refresh
    evenmoe   evenmoe's plan at every refresh; the first one made anew, the others from the placement in use
    oracle    planned on each step itself, which nobody can; its copies cost nothing

A policy that plans starts like identity, in its own number of slots, and sees only steps that are over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from evenmoe.errors import ConstraintError
from evenmoe.rules.catalogue import RULES
from evenmoe.simulator.world import World

DEFAULT = (
    "identity",
    "static",
    "greedy",
    "evenmoe:rule=rank",
    "evenmoe:rule=occurrence",
    "evenmoe:rule=batch",
    "oracle",
)

_PLANNED = ("rule", "slots", "groups")
_KEYS = {
    "identity": ("rule",),
    "static": (*_PLANNED, "window", "pieces", "planner", "plan-for"),
    "greedy": (*_PLANNED, "refresh", "window"),
    "evenmoe": (*_PLANNED, "refresh", "window", "pieces", "plan-for", "max-copies", "target-par", "start"),
    "oracle": (*_PLANNED, "planner", "plan-for"),
}
_WORDS = {"rule": RULES, "plan-for": RULES, "start": ("first", "previous", "scratch"), "planner": ("evenmoe", "greedy")}
_LEAST = {"slots": 1, "groups": 1, "refresh": 1, "window": 1, "pieces": 1, "max-copies": 0}


@dataclass(frozen=True)
class Policy:
    """One policy with all its choices made.

    Attributes:
        name: as written.
        kind: the word before the colon.
        rule: replica rule that its tokens follow.
        num_slots: S.
        num_groups: expert groups that stay inside nodes; 1 plans across nodes.
        refresh: steps between refreshes, read for greedy and evenmoe.
        window: past steps that a plan is made from, at most.
        pieces: windows that those steps are added up to; a plan from more than one looks at how loads vary.
        plan_for: rule that the plan is made for.
        max_copies: of a layer in a plan that starts from the placement in use; None for no bound.
        target_par: at which such a plan stops copying, or None.
        start: which plans are made anew: "first" the first one, "scratch" all, "previous" none.
        planner: "evenmoe" or "greedy".
    """

    name: str
    kind: str
    rule: str
    num_slots: int
    num_groups: int
    refresh: int
    window: int
    pieces: int
    plan_for: str
    max_copies: int | None
    target_par: float | None
    start: str
    planner: str

    @property
    def description(self) -> str:
        """One sentence: planner, rule, when it is refreshed."""
        how = f"replicas chosen by the {self.rule} rule"
        if self.kind == "identity":
            return f"Expert s mod E in slot s for ever, {how}."
        plan = (
            "The published greedy plan" if self.planner == "greedy" else f"evenmoe's plan for the {self.plan_for} rule"
        )
        if self.num_groups > 1:
            plan += f" with {self.num_groups} groups kept inside nodes"
        if self.kind == "oracle":
            return f"{plan}, made on each step itself with free copies, {how}."
        past = f"the {self.window} steps before" + (f" as {self.pieces} windows" if self.pieces > 1 else "")
        if self.kind == "static":
            return f"{plan}, made once from {past} step {self.window}, {how}."
        begin = "" if self.start == "scratch" else ", starting from the placement in use"
        begin += " but for the first time" if self.start == "first" else ""
        begin += "" if self.max_copies is None else f", at most {self.max_copies} copies a layer"
        begin += "" if self.target_par is None else f", down to a PAR of {self.target_par:g}"
        return f"{plan}, made every {self.refresh} steps from {past}{begin}, {how}."

    def is_due(self, step: int) -> bool:
        """Whether a plan is made before this step, from the steps that are over."""
        if self.kind in ("identity", "oracle") or step == 0:
            return False
        return step == self.window if self.kind == "static" else step % self.refresh == 0


def parse_policies(
    texts: list[str] | tuple[str, ...],
    world: World,
    *,
    num_experts: int,
    num_slots: int,
    num_groups: int = 1,
    refresh: int,
    window: int,
) -> tuple[Policy, ...]:
    """The policies of a run, the first identity in front (added where there is none).

    Args:
        texts: as given to `--policy`.
        num_slots, num_groups, refresh, window: where a policy does not say.

    Raises:
        ConstraintError: names the policy, the key and what it may be.

    >>> first, second = parse_policies(["greedy:rule=token"], World(2), num_experts=3, num_slots=6, refresh=9, window=5)
    >>> first.name, first.num_slots, second.rule, second.refresh
    ('identity', 4, 'token', 9)
    """
    policies = [
        _parse(
            text, world, num_experts, {"slots": num_slots, "groups": num_groups, "refresh": refresh, "window": window}
        )
        for text in texts
    ]
    baseline = next((policy for policy in policies if policy.kind == "identity"), None)
    if baseline is None:
        baseline = _parse("identity", world, num_experts, {})
    policies = [baseline, *(policy for policy in policies if policy is not baseline)]
    names = [policy.name for policy in policies]
    for name in names:
        if names.count(name) > 1:
            raise ConstraintError("policy", repr(name), "must be given once", "change an option, or leave one out")
    return tuple(policies)


def _parse(text: str, world: World, num_experts: int, defaults: dict[str, int]) -> Policy:
    kind, found = _read_keys(text)

    def word(key: str, default: str) -> str:
        value = found.get(key, default)
        if value not in _WORDS[key]:
            _refuse(text, f"has {key}={value}", f"use one of {', '.join(_WORDS[key])}")
        return value

    def whole(key: str, default: int) -> int:
        return int(_number(text, key, found[key], int, _LEAST[key])) if key in found else default

    slots, groups = whole("slots", defaults.get("slots", 1)), whole("groups", defaults.get("groups", 1))
    slots = _check_slots(text, kind, slots, groups, world, num_experts)
    rule = word("rule", "batch" if kind == "oracle" else "rank")
    start = word("start", "first" if kind == "evenmoe" else "scratch")
    limits = [key for key in ("max-copies", "target-par") if key in found]
    if start == "scratch" and limits:  # only evenmoe takes limits
        _refuse(text, f"has {limits[0]} with start=scratch", "leave out one of them: a limit needs a placement to keep")
    bound = None
    if start != "scratch":
        # Keeping up with a drift of 15 % takes DeepSeek-V3's layers 28 to 35 copies of 288 slots to a PAR of 1.01.
        bound = whole("max-copies", max(1, slots // 8))
    return Policy(
        name=text,
        kind=kind,
        rule=rule,
        num_slots=slots,
        num_groups=groups,
        refresh=whole("refresh", defaults.get("refresh", 1)),
        window=whole("window", defaults.get("window", 1)),
        pieces=whole("pieces", 1),
        plan_for=word("plan-for", "even" if kind == "oracle" else rule),
        max_copies=bound,
        target_par=_number(text, "target-par", found["target-par"], float, 1) if "target-par" in found else None,
        start=start,
        planner="greedy" if kind == "greedy" else word("planner", "evenmoe"),
    )


def _read_keys(text: str) -> tuple[str, dict[str, str]]:
    """The policy's kind, and what is given of its keys."""
    kind, colon, rest = text.partition(":")
    if kind not in _KEYS:
        _refuse(text, f"begins with {kind!r}, which is no policy", f"use one of {', '.join(_KEYS)}")
    if colon and not rest:
        _refuse(text, "ends in a colon", "write key=value behind it, or leave it out")
    found: dict[str, str] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if key not in _KEYS[kind]:
            _refuse(text, f"has {key!r}, which {kind} does not take", f"use {', '.join(_KEYS[kind])}")
        if not equals or not value:
            _refuse(text, f"gives {key!r} no value", f"write {key}=value")
        if key in found:
            _refuse(text, f"gives {key!r} twice", "give it once")
        found[key] = value
    return kind, found


def _check_slots(text: str, kind: str, slots: int, groups: int, world: World, num_experts: int) -> int:
    """The slots of the policy, once they and the groups are known to work."""
    fewest = -(-num_experts // world.num_ranks) * world.num_ranks
    if kind == "identity":
        return fewest
    if slots < num_experts or slots % world.num_ranks:
        _refuse(
            text,
            f"has {slots} slots for {num_experts} experts on {world.num_ranks} ranks",
            f"use a multiple of {world.num_ranks}, {fewest} or more",
        )
    if groups > 1 and world.num_nodes > 1 and (groups % world.num_nodes or num_experts % groups):
        _refuse(
            text,
            f"has {groups} groups of {num_experts} experts on {world.num_nodes} nodes",
            f"use 1, or a multiple of {world.num_nodes} that divides {num_experts}",
        )
    return slots


def _number(text: str, key: str, value: str, kind: Callable[[str], float], least: int) -> int | float:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not least <= number < 1 << 31:
        _refuse(text, f"has {key}={value}", f"use a {'whole number' if kind is int else 'number'}, {least} or more")
    return number


def _refuse(text: str, what: str, fix: str) -> NoReturn:
    raise ConstraintError("policy", repr(text), f"must follow NAME[:key=value,...], and {what}", fix)
