"""The serving engine that a replay is looked at for: which of its policies can be run there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evenmoe.simulator.policy_result import PolicyResult

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

_KNOWN_RULES = ("rank", "token", "occurrence", "batch", "even")


@dataclass(frozen=True)
class EngineView:
    """What a replay keeps of an engine; the attributes are keys of `--json`.

    Attributes:
        name, version, choice, loads_file, takes_plans, uneven: as in `evenmoe.engines.engine.Engine`.
        rule: name of its own rule.
        rules: names of all rules that it can choose by, or whose expected shares are those of its own.
        balancer: its own balancer, in words.
        pace: when that plans.
    """

    name: str
    version: str
    rule: str
    rules: tuple[str, ...]
    choice: str
    balancer: str
    pace: str
    loads_file: bool
    takes_plans: bool
    uneven: bool

    @staticmethod
    def of(engine: Engine) -> EngineView:
        """What is kept of an engine.

        >>> from evenmoe.engines import ENGINES
        >>> EngineView.of(ENGINES.get("vllm")).rules
        ('token', 'even')
        """
        from evenmoe.rules import RULES

        own = RULES.get(engine.rule).name
        rules = (own, *engine.runs, *(name for name in _KNOWN_RULES if engine.can_run(name)))
        return EngineView(
            name=engine.name,
            version=engine.version,
            rule=own,
            rules=tuple(dict.fromkeys(rules)),
            choice=engine.choice,
            balancer=engine.balancer_words,
            pace=engine.pace,
            loads_file=engine.loads_file,
            takes_plans=engine.takes_plans,
            uneven=engine.uneven,
        )

    def is_own(self, policy: PolicyResult) -> bool:
        """Whether the policy is the engine's own balancer."""
        return policy.own_of == self.name

    def differs(self, policy: PolicyResult) -> str | None:
        """Why the engine cannot have what the policy showed, in two or three words; None where it can.

        Where every expert has one replica, any rule chooses it.
        """
        if policy.sees_future:
            return "sees the step"
        has_replicas = policy.final.num_slots > policy.final.num_experts
        if has_replicas and policy.rule not in self.rules:
            return f"{policy.rule} rule"
        if not self.uneven and not policy.final.is_even:
            return "uneven slots"
        if len(policy.refreshes) > 1 and not self.takes_plans and not self.is_own(policy):
            return "plans anew"
        return None

    def cannot_run(self, policy: PolicyResult) -> str | None:
        """Why the engine cannot run the policy, likewise; the default placement needs no file."""
        if self.loads_file or self.is_own(policy) or _is_default(policy):
            return self.differs(policy)
        return self.differs(policy) or "loads no file"


def _is_default(policy: PolicyResult) -> bool:
    slots = policy.initial.slot_to_expert
    default = np.arange(slots.shape[1]) % policy.initial.num_experts
    return not len(policy.refreshes) and bool((slots == default).all())
