"""The grammar of policies, which the module `policies` tells of: NAME[:key=value,...].

A name is identity, static, oracle, or that of a planner (`evenmoe.planner.planners`), whose policy is `Refreshed`; a
user's own planner is py:module:function or py:file.py:function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.planner.planners import PLANNERS
from evenmoe.registry import Registry
from evenmoe.rules.catalogue import RULES
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.policies import Oracle, Policy, Refreshed, Static

_LEAST = {"slots": 1, "groups": 1, "refresh": 1, "window": 1, "pieces": 1, "max-copies": 0}
_SCHEDULES: dict[str, type[Policy]] = {"identity": Policy, "static": Static, "oracle": Oracle}


def parse_policies(
    texts: Sequence[str],
    cluster: Cluster,
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

    >>> counts = {"num_experts": 3, "num_slots": 6, "refresh": 9, "window": 5}
    >>> first, second = parse_policies(["greedy:rule=token"], Cluster(2), **counts)
    >>> first.name, first.num_slots, second.rule.name, second.refresh
    ('identity', 4, 'token', 9)
    """
    defaults = {"slots": num_slots, "groups": num_groups, "refresh": refresh, "window": window, "pieces": 1}
    read = [PolicyText(text, defaults) for text in texts]
    policies = [text.policy.read(text, cluster, num_experts) for text in read]
    baseline = next((policy for policy in policies if type(policy) is Policy), None)
    if baseline is None:
        baseline = Policy.read(PolicyText("identity", defaults), cluster, num_experts)
    policies = [baseline, *(policy for policy in policies if policy is not baseline)]
    names = [policy.name for policy in policies]
    for name in names:
        if names.count(name) > 1:
            raise ConstraintError("policy", repr(name), "must be given once", "change an option, or leave one out")
    return tuple(policies)


def check_policy(policy: Policy, cluster: Cluster, num_experts: int) -> None:
    """Plan one layer of equal loads, so that what the planner refuses is refused before the replay begins.

    Raises:
        ConstraintError: names the policy and what its planner says.
    """
    first = None if policy.starts_anew(has_planned=True) else policy.first_placement(cluster, 1, num_experts)
    try:
        policy.plan(cluster, np.ones((1, 1, num_experts)), first, 0)
    except ConstraintError as error:
        rule = f"must be one that can be planned, and {error.argument} {error.rule}"
        raise ConstraintError("policy", repr(policy.name), rule, error.fix) from error


class PolicyText:
    """A policy as written: its kind, what is given of its keys, and the defaults of the run."""

    def __init__(self, text: str, defaults: dict[str, int]) -> None:
        self.whole, self._defaults = text, defaults
        self.given: dict[str, str] = {}
        of_kind = 3 if text.startswith("py:") else 1
        parts = text.split(":", of_kind)
        kind, options = ":".join(parts[:of_kind]), (parts[of_kind:] or [None])[0]
        self.policy = _SCHEDULES.get(kind, Refreshed)
        if self.policy is Refreshed and not kind.startswith("py:") and kind not in PLANNERS:
            names = ("identity", "static", *PLANNERS, "oracle")
            self.fail(f"begins with {kind!r}, which is no policy", f"use one of {', '.join(names)}")
        keys = self.policy.keys(kind)
        if options == "":
            self.fail("ends in a colon", "write key=value behind it, or leave it out")
        for part in options.split(",") if options else ():
            key, equals, value = part.partition("=")
            if key not in keys:
                self.fail(f"has {key!r}, which {kind} does not take", f"use {', '.join(keys)}")
            if not equals or not value:
                self.fail(f"gives {key!r} no value", f"write {key}=value")
            if key in self.given:
                self.fail(f"gives {key!r} twice", "give it once")
            self.given[key] = value
        self.planner = kind if self.policy is Refreshed else self.given.get("planner", "evenmoe")
        self._named(PLANNERS, "planner", "evenmoe")

    def rule(self, key: str, default: str) -> Rule:
        return self._named(RULES, key, default)

    def rule_name(self, key: str, default: str) -> str:
        self._named(RULES, key, default)
        return self.given.get(key, default)

    def word(self, key: str, words: Sequence[str], default: str) -> str:
        value = self.given.get(key, default)
        if value not in words:
            self.fail(f"has {key}={value}", f"use one of {', '.join(words)}")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number: as given, else the default, else that of the run."""
        if key not in self.given:
            return self._defaults[key] if default is None else default
        return int(self._number(key, int, "whole number", _LEAST[key]))

    def real(self, key: str) -> float:
        return self._number(key, float, "number", 1)

    def _number(self, key: str, kind: Callable[[str], float], what: str, least: int) -> float:
        try:
            number = kind(self.given[key])
        except ValueError:
            number = None
        if number is None or not least <= number < 1 << 31:
            self.fail(f"has {key}={self.given[key]}", f"use a {what}, {least} or more")
        return number

    def _named(self, registry: Registry[Any], key: str, default: str) -> Any:
        value = self.given.get(key, default)
        try:
            return registry.get(value)
        except ConstraintError as error:
            reason = f", which {error.rule}" if value.startswith("py:") else ""
            self.fail(f"has {key}={value}{reason}", f"use one of {', '.join(registry)}, or py:module:attribute")

    def fail(self, what: str, fix: str) -> NoReturn:
        raise ConstraintError("policy", repr(self.whole), f"must follow NAME[:key=value,...], and {what}", fix)

    def check_slots(self, slots: int, groups: int, cluster: Cluster, num_experts: int) -> None:
        if slots < num_experts or slots % cluster.num_ranks:
            self.fail(
                f"has {slots} slots for {num_experts} experts on {cluster.num_ranks} ranks",
                f"use a multiple of {cluster.num_ranks}, {cluster.fewest_slots(num_experts)} or more",
            )
        if groups > 1 and cluster.num_nodes > 1 and (groups % cluster.num_nodes or num_experts % groups):
            self.fail(
                f"has {groups} groups of {num_experts} experts on {cluster.num_nodes} nodes",
                f"use 1, or a multiple of {cluster.num_nodes} that divides {num_experts}",
            )
