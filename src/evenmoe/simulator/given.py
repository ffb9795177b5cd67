"""The policies of a replay, as texts or as objects: `parse_policies`.

A text is what `--policy` takes. A `Placement` stays for ever; a function that is called as `evenmoe.plan` is, is asked
for a plan at every refresh; a `Rule` is evenmoe's plan for it; a `Policy` is taken as it is. A text of the form
py:module:attribute may name any of them, and file:PATH a placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.placement import Placement
from evenmoe.planner import Planner
from evenmoe.registry import import_attribute
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.fixed import FILE, ReplayedTrace, fixed_policy, read_fixed
from evenmoe.simulator.own_balancer import OWN, OwnBalancer
from evenmoe.simulator.policies import Policy, read_policy
from evenmoe.simulator.policy_text import PolicyText, called

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

Given = str | Path | Placement | Rule | Planner | Policy
Policies = Sequence[Given] | Mapping[str, Given]


def parse_policies(
    policies: Policies,
    cluster: Cluster,
    *,
    num_experts: int,
    num_slots: int,
    num_groups: int = 1,
    refresh: int,
    window: int,
    first: int | None = None,
    replayed: ReplayedTrace | None = None,
    engine: Engine | None = None,
) -> tuple[Policy, ...]:
    """The policies of a run, the first identity in front (added where there is none).

    Args:
        policies: texts as given to `--policy`; or placements, planners, rules and policies, by name if it is a dict.
        num_slots, num_groups, refresh, window: where a policy does not say.
        first: the step before which those plan for the first time that do not say a refresh; by default `refresh`.
        replayed: the trace, which placements must fit.
        engine: whose rule those have that do not say, and whose own balancer `own` is.

    Raises:
        UnsupportedTypeError: something that is no policy.
        ConstraintError: names the policy, the key and what it may be.

    >>> counts = {"num_experts": 3, "num_slots": 6, "refresh": 9, "window": 5}
    >>> first, second = parse_policies(["greedy:rule=token"], Cluster(2), **counts)
    >>> first.name, first.num_slots, second.rule.name, second.refresh
    ('identity', 4, 'token', 9)
    """
    defaults = {"slots": num_slots, "groups": num_groups, "refresh": refresh, "window": window, "pieces": 1}
    defaults["first"] = refresh if first is None else first
    reader = _Reader(cluster, num_experts, defaults, replayed, engine)
    found = [reader.read(name, given) for name, given in _named(policies)]
    baseline = next((policy for policy in found if type(policy) is Policy), None)
    if baseline is None:
        baseline = Policy.read(PolicyText("identity", defaults, engine=engine), cluster, num_experts)
    found = [baseline, *(policy for policy in found if policy is not baseline)]
    names = [policy.name for policy in found]
    for name in names:
        if names.count(name) > 1:
            fix = "change an option, leave one out, or name them in a dict"
            raise ConstraintError("policy", repr(name), "must be given once", fix)
    return tuple(found)


def _named(policies: Policies) -> Iterator[tuple[str | None, Given]]:
    if isinstance(policies, Mapping):
        for name in policies:
            if not isinstance(name, str) or not name.strip():
                raise ConstraintError("policies", f"a dict with {name!r}", "must name each policy", "use texts as keys")
        yield from policies.items()
    elif isinstance(policies, str | Placement | Rule | Policy) or not isinstance(policies, Sequence):
        what = repr(policies) if isinstance(policies, str) else f"of type {type(policies).__name__}"
        raise ConstraintError("policies", what, "must be a sequence or a dict of policies", "put each policy in a list")
    else:
        yield from ((None, given) for given in policies)


@dataclass
class _Reader:
    """What policies are read with."""

    cluster: Cluster
    num_experts: int
    defaults: Mapping[str, int]
    replayed: ReplayedTrace | None
    engine: Engine | None

    def read(self, name: str | None, given: Given) -> Policy:
        """The policy that is given, by that name or its own."""
        if isinstance(given, Path):
            given = f"{FILE}{given}"
        policy = self._of_text(self._text(given)) if isinstance(given, str) else self._of_object(name, given)
        if name is None or name == policy.name:
            return policy
        # What sees the future is told by its name, so it keeps the word.
        kept = f"oracle: {name}" if policy.sees_the_step and name.partition(":")[0] != "oracle" else name
        return replace(policy, name=kept)

    def _of_text(self, text: PolicyText) -> Policy:
        if text.kind == OWN:
            return OwnBalancer.read(text, self.cluster, self.num_experts)
        if text.kind.startswith(FILE):
            return read_fixed(text, self.cluster, self._trace())
        if text.kind.startswith("py:"):
            thing = import_attribute("policy", text.whole, text.kind[3:])
            if isinstance(thing, Placement):
                text.read_options(("rule",))
                rule = text.rule("rule", "rank")
                return fixed_policy(text.whole, thing, rule, self.cluster, self._trace())
            if isinstance(thing, Rule | Policy):
                text.read_options(())
                return self._of_object(text.whole, thing)
        return read_policy(text, self.cluster, self.num_experts)

    def _of_object(self, name: str | None, given: Given) -> Policy:
        if isinstance(given, Policy):
            return given
        if isinstance(given, Placement):
            rule = RULES.get(self._text("placement").standard("rank"))
            return fixed_policy(name or "placement", given, rule, self.cluster, self._trace())
        if isinstance(given, Rule):
            policy = read_policy(self._text("evenmoe"), self.cluster, self.num_experts)
            return replace(policy, name=name or f"evenmoe:rule={given.name}", rule=given, plan_for=given.plan_for)
        if callable(given) and not isinstance(given, type):
            return read_policy(self._text(name or called(given), given), self.cluster, self.num_experts)
        raise UnsupportedTypeError(
            "policies",
            f"with {given!r}" if isinstance(given, type) else f"with something of type {type(given).__name__}",
            "must hold texts, placements, planners, rules or policies",
            "pass what can be replayed",
        )

    def _text(self, text: str, planner: Planner | None = None) -> PolicyText:
        return PolicyText(text, self.defaults, planner, self.engine)

    def _trace(self) -> ReplayedTrace:
        assert self.replayed is not None, "placements need the trace that they serve"
        return self.replayed
