"""What `advise` found, in one sentence, as a table, and as the object of --json."""

from __future__ import annotations

import math

from evenmoe.advice.advise import LEAST_PERCENT, Advice, Reason, Trial
from evenmoe.quantities import counted

_REASONS: dict[Reason, str] = {
    "too balanced": "the load is as even as a balanced router's",
    "does not last": "what was busy in the part that plans were made from is not what is busy later",
    "decode reads more weights": "every replica is one more expert whose weights are read, which costs more than it "
    "evens out",
    "not enough tokens": "steps of so few tokens take as long under any placement",
    "the model cannot tell": f"the gain is real under the model, and below the {LEAST_PERCENT:g} % that the "
    "model is sure of",
    "not enough evidence": "the recording is too short, or varies too much from part to part",
}


def sentence(found: Advice, source: str = "SOURCE") -> str:
    """The verdict in one sentence, with what to do."""
    best = found.best
    if found.kind == "pays":
        paid = math.ceil(best.break_even_steps)
        return (
            f"It pays: {_step(found, best)} {best.after_us:,.0f} µs in place of {best.before_us:,.0f} in the MoE "
            f"layers, {best.gain.percent:.1f} % less (at least {best.gain.lower:.1f} %), and its "
            f"{counted(best.copies, 'copy', 'copies')} are paid after {counted(paid, 'step')}. "
            f"Plan it with: {plan_line(found, source)}"
        )
    near = (
        f"the nearest is {best.gain.percent:.1f} % less ({_limits(best)}): {_step(found, best)} {best.after_us:,.0f} µs"
    )
    why = _REASONS[found.reason]
    if found.kind == "does not pay":
        return f"It does not pay: {why}; {near} in place of {best.before_us:,.0f}."
    return f"Too close to call: {why}; {near} in place of {best.before_us:,.0f}. {to_record(found)}"


def plan_line(found: Advice, source: str) -> str:
    """The command that plans what is recommended."""
    best = found.best
    words = ["evenmoe plan", source, f"--ranks {found.num_ranks} --slots {best.num_slots} --for {found.engine.name}"]
    words.append(f"-o placement{found.engine.suffixes[0] if found.engine.suffixes else '.json'}")
    if best.objective == "decode":
        words.append(f"--objective decode --tokens-per-step {best.tokens} --top-k {found.top_k}")
        words.append(f"--weight-rows {best.weight_rows}")
    return " ".join(words)


def to_record(found: Advice) -> str:
    """What to record, where there is too little."""
    if found.reason == "the model cannot tell":
        return "Time both placements on the machine itself: no longer recording decides this."
    recorded = found.uneven.assignments
    reach = 100 * (found.uneven.total_limit - 1)
    more = (reach / LEAST_PERCENT) ** 2 if not found.uneven.is_uneven else 4.0
    if not math.isfinite(more):
        more = 4.0
    wanted = math.ceil(max(2.0, more) * max(recorded, 1.0) / found.top_k)
    return f"Record {wanted:,} tokens or more, request by request; there are {round(recorded / found.top_k):,}."


def as_json(found: Advice, source: str) -> dict[str, object]:
    """The object of --json, without its schema."""
    return {
        "kind": found.kind,
        "reason": found.reason,
        "sentence": sentence(found, source),
        "engine": found.engine.version,
        "gpu": found.gpu,
        "basis": found.basis,
        "kernel_source": found.source,
        "model": found.model,
        "num_ranks": found.num_ranks,
        "num_experts": found.num_experts,
        "top_k": found.top_k,
        "held_out": found.held_out.words,
        "is_uneven": found.uneven.is_uneven,
        "plan": plan_line(found, source) if found.kind == "pays" else None,
        "best": found.trials.index(found.best),
        "trials": [trial_object(trial) for trial in found.trials],
    }


def trial_object(trial: Trial) -> dict[str, object]:
    """One of `trials`."""
    return {
        "phase": trial.phase,
        "tokens": trial.tokens,
        "objective": trial.objective,
        "rule": trial.rule,
        "runs": trial.runs,
        "num_slots": trial.num_slots,
        "before_us": trial.before_us,
        "after_us": trial.after_us,
        "gain_percent": trial.gain.percent,
        "gain_lower_percent": trial.gain.lower,
        "gain_upper_percent": trial.gain.upper,
        "pays": trial.pays and trial.runs,
        "copies": trial.copies,
        "copy_us": trial.copy_us,
        "memory_bytes": trial.memory_bytes,
        "break_even_steps": trial.break_even_steps,
    }


def _step(found: Advice, trial: Trial) -> str:
    return (
        f"on {found.num_ranks} {found.gpu}, a {trial.phase} step of {counted(trial.tokens, 'token')} with "
        f"{trial.num_slots} slots under {found.engine.name}'s rule takes"
    )


def _limits(trial: Trial) -> str:
    if not math.isfinite(trial.gain.lower):
        return "how sure, is not known"
    return f"from {trial.gain.lower:.1f} to {trial.gain.upper:.1f} %"
