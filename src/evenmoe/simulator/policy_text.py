"""A policy as it is written: NAME[:key=value,...].

The name may be py:module:function, py:file.py:function, or file:PATH of a placement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

from evenmoe.errors import ConstraintError
from evenmoe.planner import PLANNERS, Planner
from evenmoe.registry import Registry
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

Thing = TypeVar("Thing")

# A path may have commas and colons, as long as it has no equals sign.
_OPTION = re.compile(r"(?:^|(?<=,))(?:[^,=]*=py:[^=]+?\.py(?=[:,]|$)(?::[^,]*)?|[^,]*)(?=,|$)")
_LEAST = {"slots": 1, "groups": 1, "refresh": 1, "window": 1, "pieces": 1, "max-copies": 0, "weight-rows": 0}


def called(planner: str | Planner) -> str:
    """What a planner is called, which may be a function."""
    return planner if isinstance(planner, str) else getattr(planner, "__name__", type(planner).__name__)


class PolicyText:
    """A policy as written: its kind, what is given of its keys, and the defaults of the run.

    With a `planner`, a function, it is that function's policy, and the text is its name alone. For an `engine`, its
    rule is that of policies that do not say.
    """

    def __init__(
        self, text: str, defaults: Mapping[str, int], planner: Planner | None = None, engine: Engine | None = None
    ) -> None:
        self.whole, self._defaults, self.planner, self.engine = text, defaults, planner, engine
        # A path may have colons: C:\\plans.py.
        kind = re.match(r"file:.*?(?=:rule=|$)|py:(?:[^=]+?\.py(?=:|$)|[^:]*)(?::[^:]*)?|[^:]*", text)
        self.kind = kind[0] if kind and planner is None else text
        self._options = text[len(self.kind) + 1 :] if len(text) > len(self.kind) else None
        self.given: dict[str, str] = {}

    def read_options(self, keys: Sequence[str]) -> None:
        """Fill `given` with what stands behind the kind, which takes these keys."""
        if self._options == "":
            self.fail("ends in a colon", "write key=value behind it, or leave it out")
        for part in _OPTION.findall(self._options) if self._options else ():
            key, equals, value = part.partition("=")
            if key not in keys:
                self.fail(f"has {key!r}, which {self.kind} does not take", f"use {', '.join(keys)}")
            if not equals or not value:
                self.fail(f"gives {key!r} no value", f"write {key}=value")
            if key in self.given:
                self.fail(f"gives {key!r} twice", "give it once")
            self.given[key] = value

    def find_planner(self) -> str | Planner:
        """The planner, or its name: the kind itself, or what is given for it."""
        if self.planner is not None:
            return self.planner
        if self.kind in PLANNERS or self.kind.startswith("py:"):
            return self.kind
        self._named(PLANNERS, "planner", "evenmoe")
        return self.given.get("planner", "evenmoe")

    def standard(self, rule: str) -> str | Rule:
        """The rule where none is given: that of the engine, or else this one."""
        return rule if self.engine is None else self.engine.rule

    def rule(self, key: str, default: str) -> Rule:
        return self._named(RULES, key, self.standard(default))

    def rule_name(self, key: str, default: str | Rule) -> str | Rule:
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

    def _named(self, registry: Registry[Thing], key: str, default: str | Thing) -> Thing:
        value = self.given.get(key, default)
        try:
            return registry.get(value)
        except ConstraintError as error:
            reason = f", which {error.rule}" if str(value).startswith("py:") else ""
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
