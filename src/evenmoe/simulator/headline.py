"""What a replay comes to: one figure, the gain in time per step with copying included, and whether it may be claimed.

The rules of `evenmoe.evidence` decide: the judged steps' times under a policy and under the default placement, paired;
one in a hundred for all policies together. Of those that are shown to gain, the one of least memory is recommended that
is not slower than the fastest: by less than `MATERIAL`, or not significantly. A replay that is looked at for an engine
has only those to choose among that the engine can run, and says what the policy gains over the engine's own balancer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenmoe.evidence import Unevenness, Verdict, balanced_par, judge, paired_gain, unevenness
from evenmoe.evidence.hold_out import CLUSTERED
from evenmoe.evidence.paired import LEVEL, t_quantile
from evenmoe.simulator.beside_own import BesideOwn, find_beside_own
from evenmoe.simulator.candidates import Candidate, find_candidates, is_thinned
from evenmoe.simulator.headline_text import ENGINE_RULES, MATERIAL, words, words_for
from evenmoe.simulator.replayed import PolicySummary, Replayed

_STEPS_TO_JUDGE = 8  # beside the warm-up
_STEPS_TO_RECORD = 12  # at least, of which 4 are the warm-up: the fewest with which a steady gain of 5 % is shown


@dataclass(frozen=True)
class Headline:
    """The one figure of a replay, and what it was measured on; its attributes are keys of `--json`.

    Attributes:
        kind: "gain", "no gain", "too little to judge", or "nothing compared" where the default placement is alone.
        reason: why no gain is claimed, "" for a gain.
        sentence: what it comes to.
        details: further sentences: with and without more slots, with the rules that engines have, what to do.
        measured_on: a sentence.
        policy: the one that is recommended, or that comes nearest to a gain; the first, if it is alone.
        net_gain_percent: its gain in time per step, copying included; this and those of other policies are nan where
            nothing was judged.
        lower_percent, upper_percent: one-sided limits of it, together wrong for any policy in one case of a hundred.
        fastest_policy, fastest_net_gain_percent: the least time per step, whatever the memory.
        rearranged_policy, rearranged_net_gain_percent: the least of those without more memory; None if there is none.
        engine_policy, engine_net_gain_percent: the least of those whose rule engines have, or that the engine can run
            for which the replay is looked at; None if there is none.
        judged_tokens: tokens of the judged steps.
        tokens_to_record, windows_to_record: in all, where there are too few to judge; else None.
        beside_own: the policy beside the own balancer of the engine that the replay is looked at for; None without one,
            or where nothing was judged.
    """

    kind: str
    reason: str
    sentence: str
    details: tuple[str, ...]
    measured_on: str
    policy: str
    net_gain_percent: float
    lower_percent: float
    upper_percent: float
    fastest_policy: str
    fastest_net_gain_percent: float
    rearranged_policy: str | None
    rearranged_net_gain_percent: float | None
    engine_policy: str | None
    engine_net_gain_percent: float | None
    judged_tokens: int
    tokens_to_record: int | None
    windows_to_record: int | None
    beside_own: BesideOwn | None = None


def find_headline(simulation: Replayed, summaries: Sequence[PolicySummary]) -> Headline:
    """The headline of a replay, whose policies have these figures."""
    chosen = [n for n, each in enumerate(summaries) if n and not each.sees_future and each.cannot_run is None]
    candidates = find_candidates(simulation, summaries, chosen)
    best: Candidate | None = None
    verdict: Verdict | None = None
    if candidates and simulation.num_judged_steps:
        shown = [candidate for candidate in candidates if candidate.gain.is_significant]
        fastest = min(shown or candidates, key=lambda candidate: candidate.summary.net_time_us)
        verdict = judge(fastest.gain, _unevenness(simulation))
        best = _recommended(simulation, shown, fastest) if verdict.kind == "gain" else fastest
    own = None if best is None else find_beside_own(simulation, summaries, best.summary)
    wanted = _to_record(simulation, verdict) if candidates else (None, None)
    text = words(simulation, summaries, candidates, best, verdict, *wanted)
    text = text if simulation.engine is None else words_for(simulation.engine, text, own)
    quickest = min(candidates, key=lambda candidate: candidate.summary.net_time_us, default=None)
    rearranged = _quickest(candidates, lambda summary: summary.extra_memory_bytes_per_rank <= 0)
    engine = _quickest(candidates, lambda summary: bool(simulation.engine) or summary.rule in ENGINE_RULES)
    first = best or quickest
    limits = (best.gain.lower, best.gain.upper) if best else (-math.inf, math.inf)
    return Headline(
        kind=text.kind,
        reason=text.reason,
        sentence=text.sentence,
        details=text.details,
        measured_on=text.measured_on,
        policy=first.summary.name if first else summaries[0].name,
        net_gain_percent=first.percent if first else 0.0,
        lower_percent=limits[0],
        upper_percent=limits[1],
        fastest_policy=quickest.summary.name if quickest else summaries[0].name,
        fastest_net_gain_percent=quickest.percent if quickest else 0.0,
        rearranged_policy=rearranged.summary.name if rearranged else None,
        rearranged_net_gain_percent=rearranged.percent if rearranged else None,
        engine_policy=engine.summary.name if engine else None,
        engine_net_gain_percent=engine.percent if engine else None,
        judged_tokens=int(simulation.tokens[simulation.judged].sum()) if simulation.num_judged_steps else 0,
        tokens_to_record=wanted[0],
        windows_to_record=wanted[1],
        beside_own=own,
    )


def _unevenness(simulation: Replayed) -> Unevenness:
    """The default placement's PAR beside that of a balanced router, step by step and of all judged steps together.

    Layers see the same tokens, so they count as one. Counts that were drawn from counts vary for two reasons.
    """
    policy, judged, ranks = simulation.policies[0], simulation.judged, simulation.num_ranks
    drawn, recorded = simulation.assignments_per_step, simulation.recorded_assignments_per_step
    variance = 1 + drawn / recorded if recorded > 0 else 1.0
    mean, deviation, _, error = (float(value) for value in balanced_par(max(drawn / variance, 1.0), ranks))
    reach = t_quantile(1 - LEVEL / 2, 10_000) * math.hypot(deviation / math.sqrt(judged.stop - judged.start), error)
    variance *= CLUSTERED if is_thinned(simulation) else 1.0
    total = unevenness(policy.rank_tokens[None].astype(np.float64), variance=variance)
    return Unevenness(
        float(policy.par[judged].mean()), total.total_par, mean + reach, total.total_limit, total.assignments
    )


def _recommended(simulation: Replayed, shown: Sequence[Candidate], fastest: Candidate) -> Candidate:
    """Of those that gain, the one of least memory that is not slower than the fastest; of these a rule that engines
    have comes first, or the engine's own balancer, then fewer copies."""
    engine = simulation.engine
    owned = {policy.name for policy in simulation.policies if engine is not None and engine.is_own(policy)}

    def is_slower(candidate: Candidate) -> bool:
        if candidate is fastest or fastest.percent - candidate.percent < MATERIAL:
            return False
        return paired_gain(candidate.times, fastest.times).is_significant

    def order(candidate: Candidate) -> tuple[float, ...]:
        summary = candidate.summary
        later = summary.rule not in ENGINE_RULES if engine is None else summary.name not in owned
        return (summary.memory_bytes_per_rank, later, summary.copies, summary.net_time_us)

    return min((candidate for candidate in shown if not is_slower(candidate)), key=order)


def _quickest(candidates: Sequence[Candidate], fits) -> Candidate | None:
    found = [candidate for candidate in candidates if fits(candidate.summary)]
    return min(found, key=lambda candidate: candidate.summary.net_time_us, default=None)


def _to_record(simulation: Replayed, verdict: Verdict | None) -> tuple[int | None, int | None]:
    """Tokens, in two digits, or else windows of counts to record in all; None and None where there are enough."""
    steps = (
        max(_STEPS_TO_RECORD, simulation.first_plan + _STEPS_TO_JUDGE) if simulation.first_plan else _STEPS_TO_RECORD
    )
    least = steps * int(simulation.tokens[0])
    if verdict is None:
        return least, None
    if verdict.kind != "too little to judge":
        return None, None
    if 0 < simulation.recorded_windows < len(simulation.tokens):
        return None, math.ceil(verdict.more * simulation.recorded_windows)
    wanted = max(least, math.ceil(verdict.more * simulation.recorded_tokens))
    unit = 10 ** max(0, len(str(wanted)) - 2)
    return -(-wanted // unit) * unit, None
