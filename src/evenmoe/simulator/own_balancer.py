"""An engine's own balancer as a policy, `own[:slots=S]`, and what is compared for an engine where nobody says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenmoe.planner import Planner
from evenmoe.rules import RULES
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.policies import Policy, Refreshed
from evenmoe.simulator.policy_text import PolicyText

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

OWN = "own"
_NEVER = 1 << 31  # steps, more than are replayed


@dataclass(frozen=True)
class OwnBalancer(Refreshed):
    """The planner that stands for an engine's own balancer, at its own interval, under its own rule.

    Attributes:
        balancer: which balancer that is.
        pace: when it plans.
    """

    balancer: str = ""
    pace: str = ""

    @classmethod
    def keys(cls, planner: str | Planner) -> tuple[str, ...]:
        """See `Policy.keys`."""
        return ("slots", "groups")

    @classmethod
    def read(cls, text: PolicyText, cluster: Cluster, num_experts: int) -> Policy:
        """See `Policy.read`.

        Raises:
            ConstraintError: the replay is for no engine.
        """
        engine = text.engine
        if engine is None:
            text.fail(f"begins with {OWN!r}, an engine's own balancer", "say for which engine (engine=)")
        text.read_options(cls.keys(engine.balancer))
        slots, groups = text.number("slots"), text.number("groups")
        text.check_slots(slots, groups, cluster, num_experts)
        first = text.number("first")
        return cls(
            name=text.whole,
            rule=RULES.get(engine.rule),
            num_slots=slots,
            window=first if engine.window is None else engine.window,
            num_groups=groups,
            planner=engine.balancer,
            first=first,
            refresh=_NEVER if engine.interval is None else engine.interval,
            own_of=engine.name,
            balancer=engine.balancer_words,
            pace=engine.pace,
        )

    @property
    def description(self) -> str:
        """See `Policy.description`."""
        groups = f" with {self.num_groups} groups kept inside nodes" if self.num_groups > 1 else ""
        return (
            f"{self.own_of}'s own balancer ({self.balancer}; replayed as the {self.planner} planner) on "
            f"{self.num_slots} slots{groups}, which plans {self.pace}, here from step {self.first} on, {self._choice}."
        )


def policies_for(engine: Engine, num_slots: int, fewest: int) -> tuple[str, ...]:
    """What is compared for an engine where nobody says.

    With and without a slot more than there must be, its own balancer and evenmoe's plan, both under its own rule; what
    evenmoe's two rules of its own would do; and a plan made on each step itself.

    >>> from evenmoe.engines import ENGINES
    >>> policies_for(ENGINES.get("vllm"), 40, 32)[:5]
    ('identity', 'own:slots=32', 'own', 'evenmoe:slots=32', 'evenmoe')
    """
    without = (f":slots={fewest}",) if num_slots > fewest else ()
    pairs = (f"{kind}{slots}" for kind in (OWN, "evenmoe") for slots in (*without, ""))
    others = (rule for rule in ("occurrence", "batch") if RULES.get(rule) is not RULES.get(engine.rule))
    return ("identity", *pairs, *(f"evenmoe:rule={rule}" for rule in others), "oracle")
