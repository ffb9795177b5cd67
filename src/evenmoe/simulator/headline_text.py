"""The sentences of a replay's headline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evenmoe import quantities
from evenmoe.quantities import count, counted

if TYPE_CHECKING:
    from evenmoe.evidence import Verdict
    from evenmoe.simulator.beside_own import BesideOwn
    from evenmoe.simulator.candidates import Candidate
    from evenmoe.simulator.engine_view import EngineView
    from evenmoe.simulator.replayed import PolicySummary, Replayed

#: Per cent of a step below which a gain is hardly one, and more memory not worth having.
MATERIAL = 1.0
#: Rules that inference engines have, by the number of the rank, the token's place, or a random or hashed choice.
ENGINE_RULES = ("rank", "token", "even")
_LITTLE = "too little to judge"


@dataclass(frozen=True)
class Words:
    """What a headline says; the attributes are `Headline`'s."""

    kind: str
    reason: str
    sentence: str
    details: tuple[str, ...]
    measured_on: str


def words(
    simulation: Replayed,
    summaries: Sequence[PolicySummary],
    candidates: Sequence[Candidate],
    best: Candidate | None,
    verdict: Verdict | None,
    tokens: int | None,
    windows: int | None,
) -> Words:
    """Say what was found; `best` and `verdict` are None where nothing could be judged.

    `tokens` or `windows` are to be recorded in all where there are too few.
    """
    measured = _measured_on(simulation, best)
    if not candidates:
        par = quantities.par(summaries[0].mean_par)
        alone = f"Only {summaries[0].name} was replayed"
        if simulation.engine is not None and any(summary.cannot_run for summary in summaries):
            alone = f"Of what was replayed {simulation.engine.name} can run {summaries[0].name} alone"
        alone += ", so there is nothing to compare it with"
        return Words("nothing compared", "one policy", f"{alone}; its mean PAR is {par}.", (), measured)
    if best is None or verdict is None:
        return Words(_LITTLE, "no judged steps", _nothing_judged(simulation, tokens or 0), (), measured)
    kind, reason = verdict.kind, verdict.reason
    if kind == "gain" and best.percent < MATERIAL:
        kind, reason = "no gain", "hardly a gain"
    if kind == "gain":
        sentence = (
            f"With {_called(simulation, best)} a step takes {_percent(best.percent)} less time than with "
            f"{summaries[0].name}, copying included (at least {_percent(best.gain.lower)}), for "
            f"{_memory(best.summary)}."
        )
        return Words("gain", "", sentence, _alternatives(simulation, candidates, best), measured)
    if best.gain.lower == best.gain.upper == 0:
        reason = "nothing moves"
    if reason == "does not last" and best.gain_without_copies.is_significant:
        reason = "copies cost more"
    if reason == "does not last" and _is_small_whatever_is_planned(summaries):
        reason = "little depends on it"
    sentence = _no_gain(simulation, summaries, best, verdict, reason)
    if tokens is not None:
        sentence += f" Record {count(tokens)} tokens or more; there are {count(simulation.recorded_tokens)}."
    if windows is not None:
        sentence += f" Record {count(windows)} windows or more; there are {count(simulation.recorded_windows)}."
    return Words(kind, reason, sentence, (), measured)


def words_for(engine: EngineView, said: Words, own: BesideOwn | None) -> Words:
    """The same for the engine that the replay is looked at for; `own` is the policy beside its own balancer."""
    if said.kind == "nothing compared":
        return said
    sentence = f"Under {engine.name}'s own rule ({engine.rule}), {said.sentence[0].lower()}{said.sentence[1:]}"
    if own is not None:
        return replace(said, sentence=f"{sentence} {own.words(engine)}")
    if said.reason == "no judged steps":
        return replace(said, sentence=sentence)
    missing = f"{engine.name}'s own balancer was not replayed: it is `own` among the policies of simulate --for."
    return replace(said, sentence=sentence, details=(missing, *said.details))


def _called(simulation: Replayed, best: Candidate) -> str:
    """The policy's name, and whether it is the own balancer of the engine that the replay is looked at for."""
    name = best.summary.name
    return f"its own balancer ({name})" if _is_own(simulation, best) else name


def _is_own(simulation: Replayed, best: Candidate) -> bool:
    engine = simulation.engine
    return engine is not None and any(engine.is_own(each) for each in simulation.policies if best.is_of(each))


def _percent(value: float) -> str:
    return quantities.percent(value).removeprefix("+").replace("\u00a0", " ")


def _memory(summary: PolicySummary) -> str:
    extra = summary.extra_memory_bytes_per_rank
    if extra == 0:
        return "no more memory"
    shown = quantities.QUANTITIES["extra_memory_bytes_per_rank"].shown([abs(extra)])
    return f"{shown.texts[0]} {shown.unit.partition(' ')[0]} {'more' if extra > 0 else 'less'} memory on every rank"


def _nothing_judged(simulation: Replayed, wanted: int) -> str:
    steps, warmup, per_step = len(simulation.tokens), simulation.num_warmup_steps, int(simulation.tokens[0])
    if warmup < steps:
        return (
            f"Too little to judge: tokens come again before the {counted(warmup, 'step')} of warm-up are over, and "
            "plans would be judged on what they have seen. Record more requests, or replay fewer tokens per rank."
        )
    recorded = simulation.recorded_tokens
    if recorded >= wanted:
        return (
            f"Too little to judge: none of {counted(steps, 'step')} comes after the first plan. Replay more steps; "
            f"{count(recorded)} recorded tokens are enough for {count(recorded // per_step)}."
        )
    fewer = recorded // (wanted // per_step) // simulation.num_ranks
    smaller = f", or replay {counted(1 << (fewer.bit_length() - 1), 'token')} per rank" if fewer else ""
    after = f", before step {count(simulation.first_plan)}" if simulation.first_plan > steps else ""
    return (
        f"Too little to judge: {counted(recorded, 'token')} make {counted(steps, 'step')} of {count(per_step)}, and "
        f"none comes after the first plan{after}. Record {count(wanted)} tokens or more{smaller}."
    )


def _no_gain(
    simulation: Replayed, summaries: Sequence[PolicySummary], best: Candidate, verdict: Verdict, reason: str
) -> str:
    uneven, baseline = verdict.unevenness, summaries[0].name
    chance = (
        f"{baseline}'s mean PAR of {quantities.par(uneven.par)} is no more than chance makes of a balanced router "
        f"(up to {quantities.par(uneven.limit)} in a step; {quantities.par(uneven.total_par)} of up to "
        f"{quantities.par(uneven.total_limit)} in all steps together)"
    )
    nearest = f"{best.summary.name} comes nearest, with {_signed(best.percent)}"
    if reason == "already balanced":
        return f"There is nothing to gain, the load is balanced already: {chance}."
    if reason == "sampling noise":
        return f"Too little to judge: {chance}, and that could hide a gain."
    if reason == "nothing moves":
        return (
            f"There is no gain: {best.summary.name} changes nothing, as where every rank has one slot and one expert."
        )
    if reason == "hardly a gain":
        return f"There is hardly a gain: {nearest} of a step's time, copying included, which is real but below 1 %."
    if reason == "copies cost more":
        waits = "before the horizon is over" if simulation.copy_overlap else "and steps wait for copies"
        return (
            f"There is no gain, copying included: {best.summary.name} alone would save "
            f"{_percent(best.summary.gain_percent)}, but its copies take {_time(best.summary.refresh_copy_time_us)} a "
            f"refresh, {waits}."
        )
    if reason == "little depends on it":
        saved = _percent(_oracle(summaries)) if _oracle(summaries) >= 0.05 else "nothing"
        return (
            f"There is no gain: {nearest}, at most {_signed(best.gain.upper)}. Even a plan made on each step itself "
            f"saves {saved}: these steps take what no placement changes."
        )
    if verdict.kind == "no gain":
        oracle = _oracle(summaries)
        later = f", where a plan made on each step itself would save {_percent(oracle)}" if oracle > 0 else ""
        return (
            f"There is no gain: {nearest}, at most {_signed(best.gain.upper)}{later}: what was busy in the warm-up is "
            "not what is busy later."
        )
    if not math.isfinite(best.gain.lower):
        return f"Too little to judge: {nearest}, in {counted(best.gain.blocks, 'block')} of steps that can be compared."
    return (
        f"Too little to judge: {nearest}, but its true gain may be anything from {_signed(best.gain.lower)} to "
        f"{_signed(best.gain.upper)}."
    )


def _signed(value: float) -> str:
    return quantities.percent(value).replace("\u00a0", " ")


def _time(microseconds: float) -> str:
    shown = quantities.QUANTITIES["total_copy_time_us"].shown([microseconds])
    return f"{shown.texts[0]} {shown.unit}"


def _oracle(summaries: Sequence[PolicySummary]) -> float:
    return max((summary.gain_percent for summary in summaries if summary.sees_future), default=0.0)


def _is_small_whatever_is_planned(summaries: Sequence[PolicySummary]) -> bool:
    return any(summary.sees_future for summary in summaries) and _oracle(summaries) < 2.0


def _alternatives(simulation: Replayed, candidates: Sequence[Candidate], best: Candidate) -> tuple[str, ...]:
    """What more slots would add, what none gives, what engines' rules give, and how to get the placement."""
    said = []
    extra = best.summary.extra_memory_bytes_per_rank
    others = sorted(candidates, key=lambda candidate: candidate.summary.net_time_us)
    without = [other for other in others if other.summary.extra_memory_bytes_per_rank <= 0]
    if extra <= 0 and others[0] is not best and others[0].summary.extra_memory_bytes_per_rank > 0:
        said.append(
            f"More slots would make it {_signed(others[0].percent)} ({others[0].summary.name}, "
            f"{_memory(others[0].summary)}), which this trace does not show to be worth them."
        )
    if extra > 0 and without:
        said.append(f"Without more memory the best is {without[0].summary.name}: {_signed(without[0].percent)}.")
    if extra > 0 and not without:
        slots = simulation.policies[0].initial.num_slots
        said.append(
            f"Whether {slots} slots would do, without more memory, was not tried: add -p evenmoe:slots={slots}."
        )
    if best.summary.rule not in ENGINE_RULES and simulation.engine is None:
        by_engine = [other for other in others if other.summary.rule in ENGINE_RULES]
        if by_engine:
            said.append(
                f"The {best.summary.rule} rule is evenmoe's own; with those that engines have "
                f"({', '.join(ENGINE_RULES)}) the best is {by_engine[0].summary.name}: {_signed(by_engine[0].percent)}."
            )
    if not best.summary.refreshes:
        said.append(
            f"{best.summary.name} is in use from the start, so that nothing is copied. If it was made from this trace, "
            "the gain is one on what it has seen."
        )
    return (*said, *_what_to_do(simulation, best))


def _what_to_do(simulation: Replayed, best: Candidate) -> tuple[str, ...]:
    engine = simulation.engine
    if engine is not None and _is_own(simulation, best):
        redundant = best.summary.num_slots - simulation.num_experts
        return (f"{best.summary.name} is what {engine.name} does by itself ({engine.balancer}), with {redundant} "
                "redundant experts.",)  # fmt: skip
    kind = best.summary.name.partition(":")[0]
    planner = {"greedy": " --planner greedy", "evenmoe": "", "static": ""}.get(kind)
    if planner is None:
        return ()
    target = f"--rule {best.summary.rule}" if engine is None else f"--for {engine.name} -o FILE"
    nodes = f" --nodes {simulation.num_nodes}" if simulation.num_nodes > 1 else ""
    tokens = count(simulation.num_warmup_steps * int(simulation.tokens[0]))
    return (
        f"To get the placement: evenmoe plan LOAD --ranks {simulation.num_ranks} --slots {best.summary.num_slots}"
        f"{nodes} {target}{planner}, from the load of {tokens} tokens or more.",
    )


def _measured_on(simulation: Replayed, best: Candidate | None) -> str:
    per_step = count(int(simulation.tokens[0]))
    judged, total = simulation.num_judged_steps, len(simulation.tokens)
    if judged:
        steps = f"{count(judged)} of {counted(total, 'step')} of {per_step} tokens"
        steps += f", after {counted(simulation.num_warmup_steps, 'step')} of warm-up" * bool(
            simulation.num_warmup_steps
        )
        if best is not None and best.summary.refreshes:
            plans = "one plan" if best.summary.refreshes == 1 else counted(best.summary.refreshes, "plan")
            steps += f"; {plans} in all"
    else:
        steps = f"{counted(total, 'step')} of {per_step} tokens, none of them judged"
    if simulation.recorded_windows == 1:
        steps += ", drawn from parts of one window, which cannot show whether its load lasts"
    copies = (
        "experts are copied beside the steps, as vLLM does"
        if simulation.copy_overlap
        else "steps wait while experts are copied"
    )
    engine = simulation.engine
    own = "" if engine is None else f"; {engine.name}'s own balancer ({engine.balancer}) plans {engine.pace}"
    times = f"; times are modeled for {simulation.hardware}" if simulation.hardware else ""
    return (
        f"Measured on {steps}; {copies}, those of a first plan being charged over "
        f"{counted(simulation.horizon_steps, 'step')}{own}{times}."
    )
