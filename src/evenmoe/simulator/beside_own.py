"""A policy beside the own balancer of the engine that a replay is looked at for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evenmoe import quantities
from evenmoe.simulator.candidates import find_candidates
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.replayed import PolicySummary, Replayed


@dataclass(frozen=True)
class BesideOwn:
    """What a policy gains over an engine's own balancer; the attributes are keys of `--json`.

    Attributes:
        own_policy: its own balancer, on as many slots as the policy where that was replayed.
        own_balancer_net_gain_percent: its net gain over the default placement.
        policy: the headline's; where that is the own balancer, the fastest of the others under the engine's rule with
            no more slots. None where there is none.
        gain_over_own_percent: by how much less time a step takes under it, copying included; this and its limits are
            None without a policy.
        gain_over_own_lower_percent, gain_over_own_upper_percent: one-sided limits, together wrong for any policy that
            could have been taken in one case of a hundred.
    """

    own_policy: str
    own_balancer_net_gain_percent: float
    policy: str | None
    gain_over_own_percent: float | None
    gain_over_own_lower_percent: float | None
    gain_over_own_upper_percent: float | None

    def words(self, engine: EngineView) -> str:
        """The same as a sentence."""
        itself = quantities.percent(self.own_balancer_net_gain_percent).replace("\u00a0", " ")
        if self.gain_over_own_percent is None:
            return f"{engine.name}'s own balancer, {self.own_policy}, comes to {itself}."
        lower, upper = self.gain_over_own_lower_percent, self.gain_over_own_upper_percent
        assert lower is not None
        assert upper is not None
        size = _unsigned(self.gain_over_own_percent)
        verb = "takes" if engine.loads_file else "would take"
        if lower > 0:
            found = f"{verb} {size} less time a step, copying included (at least {_unsigned(lower)})"
        elif upper < 0:
            found = f"{verb} {size} more time a step, copying included (at least {_unsigned(upper)})"
        else:
            side = "less" if self.gain_over_own_percent >= 0 else "more"
            found = f"{verb} {size} {side} time a step, copying included, which may be chance"
        unable = "" if engine.loads_file else f"; but {engine.version} starts from no placement in a file"
        return f"Against {engine.name}'s own balancer, {self.own_policy} ({itself}), {self.policy} {found}{unable}."


def _unsigned(value: float) -> str:
    return quantities.percent(abs(value)).removeprefix("+").replace("\u00a0", " ")


def find_beside_own(simulation: Replayed, summaries: Sequence[PolicySummary], best: PolicySummary) -> BesideOwn | None:
    """The headline's policy beside the engine's own balancer; None where that was not replayed."""
    engine = simulation.engine
    if engine is None:
        return None
    policies = list(enumerate(simulation.policies))
    owned = [n for n, policy in policies if engine.is_own(policy)]
    others = [n for n, policy in policies if n and not engine.is_own(policy) and engine.differs(policy) is None]
    if not owned:
        return None
    names = [summary.name for summary in summaries]
    wanted = names.index(best.name)
    if wanted in owned:
        own, others = wanted, [n for n in others if summaries[n].num_slots <= best.num_slots]
    else:
        alike = [n for n in owned if summaries[n].num_slots == best.num_slots]
        own = min(alike or owned, key=lambda n: summaries[n].net_time_us)
    found = find_candidates(simulation, summaries, others, own)
    if not found:
        return BesideOwn(names[own], summaries[own].net_gain_percent, None, None, None, None)
    compared = next((each for each in found if each.summary is best), None)
    compared = compared or min(found, key=lambda each: each.summary.net_time_us)
    percent = 100.0 * (1.0 - compared.summary.net_time_us / summaries[own].net_time_us)
    return BesideOwn(
        own_policy=names[own],
        own_balancer_net_gain_percent=summaries[own].net_gain_percent,
        policy=compared.summary.name,
        gain_over_own_percent=percent,
        gain_over_own_lower_percent=compared.gain.lower,
        gain_over_own_upper_percent=compared.gain.upper,
    )
