"""What `evenmoe plan --for ENGINE` adds: the engine's options, and its own balancer beside the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.quantities import par

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine, OwnBalancer
    from evenmoe.placement import Placement
    from evenmoe.planner.judging import JudgedPlan
    from evenmoe.planner.options import PlanOptions


def check_for(engine: Engine, out: str | None, rule: str, to: str, standard: tuple[str, str]) -> None:
    """Raise unless the other options leave rule and format to the engine and name a file that it can read.

    Args:
        engine: of `--for`.
        out, rule, to: the other options.
        standard: the values of rule and to that were not given.

    Raises:
        ConstraintError, MissingArgumentError: they do not.
    """
    for flag, given, own, default in (("--rule", rule, "", standard[0]), ("--to", to, engine.format, standard[1])):
        if given not in (default, own):
            what = f"{given} beside --for {engine.name}"
            raise ConstraintError(flag, what, "must be left to the engine", f"leave out {flag}, or --for")
    suffix = engine.suffixes[0] if engine.suffixes else ".json"
    if out is None:
        raise MissingArgumentError(
            "--out", "not given", f"must name the file that {engine.name} reads", f"pass -o placement{suffix}"
        )
    if engine.suffixes and not out.endswith(engine.suffixes):
        fix = f"name it placement{suffix}"
        raise ConstraintError("--out", out, f"must end in {' or '.join(engine.suffixes)} for {engine.name}", fix)


@dataclass(frozen=True)
class EngineOutcome:
    """What is shown of an engine.

    Attributes:
        engine: of `--for`.
        launch: its options, with values.
        own: its own balancer beside the plan; None where nothing was judged, or ranks have different numbers of slots.
        par: mean PAR of layers on the judged windows, of its balancer and of the plan.
    """

    engine: Engine
    launch: tuple[str, ...]
    own: OwnBalancer | None
    par: tuple[float, float] | None

    def summary(self) -> dict[str, object]:
        """The object `engine` of --json."""
        engine, own = self.engine, self.own
        return {
            "name": engine.name,
            "version": engine.version,
            "choice": engine.choice,
            "loads_file": engine.loads_file,
            "launch": list(self.launch),
            "notes": list(engine.notes),
            "own_balancer": None
            if own is None or self.par is None
            else {
                "description": engine.balancer_words,
                "window": engine.window,
                "interval": engine.interval,
                "plans": own.plans,
                "par": round(self.par[0], 6),
                "held_out_gain_percent": round(own.gain.percent, 6),
                "held_out_gain_lower_percent": round(own.gain.lower, 6),
            },
            "cannot_run": [rule for rule in ("occurrence", "batch") if not engine.can_run(rule)],
        }

    def words(self) -> str:
        """The same as text."""
        engine = self.engine
        lines = [f"for {engine.version} (replicas: {engine.choice}):"]
        lines += [f"    {option}" for option in self.launch]
        lines += [f"note: {note}" for note in engine.notes]
        if self.own is not None and self.par is not None:
            gain = self.own.gain
            pace = (
                "planned once"
                if engine.interval is None
                else f"every {engine.interval} steps from the last {engine.window}, a window being taken for a step"
            )
            found = (
                f"the plan's is {gain.percent:.1f} % lower (at least {gain.lower:.1f} %, at 1 %)"
                if gain.is_significant
                else f"the plan's differs by {abs(gain.percent):.1f} %, which may be chance"
                if gain.upper >= 0
                else f"the plan's is {-gain.percent:.1f} % higher"
            )
            if not engine.loads_file:
                found += ", were it in use"
            lines.append(
                f"beside its own balancer ({engine.balancer_words}; {pace}): unseen PAR {par(self.par[0])} and "
                f"{par(self.par[1])}; {found}"
            )
        return "\n".join(lines)


def engine_outcome(
    engine: Engine, path: str, placement: Placement, options: PlanOptions, judgement: JudgedPlan | None
) -> EngineOutcome:
    """Fill in the engine's options, and replay its balancer over what was judged."""
    from evenmoe.engines.engine import beside_own_balancer
    from evenmoe.metrics import mean_over_windows, peak_over_mean

    launch = engine.launch(path, placement.num_ranks, placement.num_slots, placement.num_experts)
    if judgement is None or not placement.is_even:  # no engine's own balancer plans for uneven ranks
        return EngineOutcome(engine, launch, None, None)
    held = judgement.held_out
    own = beside_own_balancer(engine, held, judgement.placement, options)
    after = mean_over_windows(peak_over_mean(judgement.rank_loads), held.judged)
    layers = held.judged.any(axis=(0, 2))
    layers |= ~layers.any()
    return EngineOutcome(engine, launch, own, (float(own.par[layers].mean()), float(after[layers].mean())))
