"""The policies that a headline may choose among, with their gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenmoe.evidence import PairedGain, paired_gain
from evenmoe.evidence.hold_out import CLUSTERED, FEWEST_WINDOWS
from evenmoe.evidence.paired import LEVEL
from evenmoe.metrics import FloatArray
from evenmoe.simulator.policy_result import PolicyResult
from evenmoe.simulator.replayed import PolicySummary, Replayed


@dataclass(frozen=True)
class Candidate:
    """A policy that could be run, with its gain.

    Attributes:
        summary: its figures.
        times: float64 (blocks of evidence,), step and copying.
        gain: of `times` over those of the policy beside it, by default the first one.
        gain_without_copies: of the steps alone.
    """

    summary: PolicySummary
    times: FloatArray
    gain: PairedGain
    gain_without_copies: PairedGain

    @property
    def percent(self) -> float:
        return self.summary.net_gain_percent if self.gain.blocks else math.nan

    def is_of(self, policy: PolicyResult) -> bool:
        """Whether the figures are of this policy."""
        return self.summary.name == policy.name


def find_candidates(
    simulation: Replayed, summaries: Sequence[PolicySummary], chosen: Sequence[int], base: int = 0
) -> list[Candidate]:
    """These policies, by number, beside the policy `base`; gains hold for all of them together."""
    if not simulation.num_judged_steps:
        nothing = PairedGain(math.nan, -math.inf, math.inf, 0, LEVEL)
        return [Candidate(summaries[n], np.zeros(0), nothing, nothing) for n in chosen]
    first, step = simulation.policies[base], simulation.judged
    before = _by_evidence(simulation, simulation.net_times(first))
    alone = _by_evidence(simulation, first.step_time[step])
    variance = CLUSTERED if is_thinned(simulation) else 1.0
    found = []
    for n in chosen:
        policy = simulation.policies[n]
        times = _by_evidence(simulation, simulation.net_times(policy))
        gain = paired_gain(before, times, comparisons=len(chosen), variance=variance)
        steps = _by_evidence(simulation, policy.step_time[step])
        without = paired_gain(alone, steps, comparisons=len(chosen), variance=variance)
        found.append(Candidate(summaries[n], times, gain, without))
    return found


def _windows(simulation: Replayed) -> np.ndarray:
    """Which window each judged step was drawn from; of tokens, every step is its own."""
    steps, total, windows = simulation.judged, len(simulation.tokens), simulation.recorded_windows
    numbers = np.arange(steps.start, steps.stop)
    return numbers * windows // total if 0 < windows < total else numbers


def is_thinned(simulation: Replayed) -> bool:
    """Whether all that could be compared are random parts of one or two windows of counts."""
    return len(np.unique(_windows(simulation))) < FEWEST_WINDOWS <= simulation.num_judged_steps


def _by_evidence(simulation: Replayed, times: FloatArray) -> FloatArray:
    """Times of the judged steps, those averaged that were drawn from one window, which are no further evidence."""
    if is_thinned(simulation):
        return times
    _, first = np.unique(_windows(simulation), return_index=True)
    return np.add.reduceat(times, first) / np.diff(np.append(first, len(times)))
