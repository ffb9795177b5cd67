"""The numbers that head a report: one line per policy, computed here once for the page, the PNGs and `--json`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evenmoe.simulator.result import PolicyResult, Simulation


@dataclass(frozen=True)
class Rows:
    """Mean rows per step that leave their source rank, float each."""

    within_node: float
    between_nodes: float
    within_node_once: float
    between_nodes_once: float


@dataclass(frozen=True)
class Summary:
    """One policy in a few numbers.

    Attributes:
        name: of the policy.
        mean_par, worst_par: mean and maximum over steps and layers of the peak-to-average load.
        step_time: mean microseconds of one step, copying not included.
        copy_time: mean microseconds of copying per step.
        gain: per cent of the first policy's step time that this one saves; nan if that is zero.
        net_gain: the same with the time of copying in both.
        copies: experts copied, all steps and layers.
        refreshes: how often the placement was replaced.
        break_even: steps until a mean refresh has paid for its copies; inf is never, 0.0 nothing copied.
        memory: bytes of expert weights on a rank, all layers.
        extra_memory: bytes on a rank beyond the first policy's.
        extra_memory_share: the same in per cent; nan if the first policy's memory is zero.
        rows: on the wire.
    """

    name: str
    mean_par: float
    worst_par: float
    step_time: float
    copy_time: float
    gain: float
    net_gain: float
    copies: int
    refreshes: int
    break_even: float
    memory: int
    extra_memory: int
    extra_memory_share: float
    rows: Rows

    @property
    def time(self) -> float:
        """Mean microseconds per step, copying included."""
        return self.step_time + self.copy_time


def summarise(simulation: Simulation) -> tuple[Summary, ...]:
    """One `Summary` per policy, in the simulation's order."""
    baseline = simulation.policies[0]
    return tuple(_summary(policy, baseline) for policy in simulation.policies)


def best_policy(simulation: Simulation) -> int:
    """Index of the policy with the least time per step, copying included, that could be run.

    The first policy is the baseline and `oracle` sees the future, so they are the best only where nothing else is.
    Of equal ones the first wins.
    """
    times = [summary.time for summary in summarise(simulation)]
    runnable = [i for i, policy in enumerate(simulation.policies) if i and not is_oracle(policy)]
    return min(runnable or range(len(times) - 1, -1, -1), key=lambda i: times[i])


def is_oracle(policy: PolicyResult) -> bool:
    """Whether the policy plans from the loads that it is then measured on."""
    return policy.name.split(":")[0] == "oracle"


def _summary(policy: PolicyResult, baseline: PolicyResult) -> Summary:
    traffic = policy.traffic
    extra = policy.memory_per_rank - baseline.memory_per_rank
    return Summary(
        name=policy.name,
        mean_par=float(policy.par.mean()),
        worst_par=float(policy.par.max()),
        step_time=float(policy.step_time.mean()),
        copy_time=float(policy.copy_time.mean()),
        gain=_saved(float(policy.step_time.mean()), float(baseline.step_time.mean())),
        net_gain=_saved(_time(policy), _time(baseline)),
        copies=int(policy.copies.sum()),
        refreshes=len(policy.refreshes),
        break_even=float(policy.break_even_steps),
        memory=int(policy.memory_per_rank),
        extra_memory=int(extra),
        extra_memory_share=100.0 * extra / baseline.memory_per_rank if baseline.memory_per_rank else math.nan,
        rows=Rows(
            within_node=float(traffic.within_node.mean()),
            between_nodes=float(traffic.between_nodes.mean()),
            within_node_once=float(traffic.within_node_once.mean()),
            between_nodes_once=float(traffic.between_nodes_once.mean()),
        ),
    )


def _time(policy: PolicyResult) -> float:
    return float(policy.step_time.mean() + policy.copy_time.mean())


def _saved(time: float, baseline: float) -> float:
    return 100.0 * (1.0 - time / baseline) if baseline > 0 else math.nan
