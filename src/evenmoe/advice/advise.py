"""`advise`: modeled step times with and without balancing, for every phase, batch size and number of extra slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evenmoe.advice.steps import DRAWS, Layout, draw_rows, exchange_us
from evenmoe.costs import find_hardware
from evenmoe.costs.hardware import Phase
from evenmoe.engines import ENGINES
from evenmoe.engines.engine import Engine
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.evidence import HeldOut, PairedGain, Unevenness, hold_out, paired_gain, unevenness
from evenmoe.evidence.hold_out import FEWEST_LAYERS, FEWEST_WINDOWS
from evenmoe.metrics import FloatArray, as_load, count_copies, within_range
from evenmoe.placement import Placement, default_placement
from evenmoe.planner.judging import rank_loads_of, without_order
from evenmoe.planner.options import PlanOptions, whole_number
from evenmoe.planner.plan import plan_with
from evenmoe.rules import RULES
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.rule import Rule
from evenmoe.simulator.costs import CostModel, route_copies
from evenmoe.traces.models import MODELS, ModelShape, shape_of
from evenmoe.traces.trace import Trace

Kind = Literal["pays", "does not pay", "too close to call"]
Reason = Literal[
    "",
    "too balanced",
    "does not last",
    "decode reads more weights",
    "not enough tokens",
    "the model cannot tell",
    "not enough evidence",
]

BATCH_SIZES = (16, 64, 256, 1024, 4096, 16384)
#: A modeled gain below is no gain: the kernel model's median error on skewed rows is 3-5 % (docs/validation.md), of
#: which most is common to both placements.
LEAST_PERCENT = 3.0
#: Extra slots may take so much of an accelerator's memory.
MEMORY_SHARE = 0.1
_MOST_EXTRA = 2  # slots a rank; more were never faster in the TensorRT-LLM tables of 256 and 288 slots
_MOST_WINDOWS = 64  # that a plan is made from, the default of `evenmoe plan --most-windows`
_DECODE_TOKENS = 128  # a rank, what DeepEP's low-latency buffers hold by default


@dataclass(frozen=True)
class Trial:
    """One phase, batch size and placement beside the default placement.

    Attributes:
        phase: whose kernels.
        tokens: of a step, over all ranks.
        objective: what was planned for, "tokens" or "decode".
        rule: name of the rule.
        runs: whether the engine can run it.
        num_slots: of the placement.
        before_us, after_us: microseconds of the MoE layers of a step, with the default placement and with the plan.
        gain: by how much less, in per cent of the experts' time and exchanges, with its limits.
        copies: experts copied from the default placement, all layers.
        copy_us: microseconds of the copies, between the ranks' nodes where they must.
        memory_bytes: of the extra slots on a rank.
        weight_rows: rows that an expert's weights were worth to the plan or the rule; 0 where these count tokens.
        break_even_steps: steps after which the copies are paid; infinite where nothing is gained.
    """

    phase: Phase
    tokens: int
    objective: str
    rule: str
    runs: bool
    num_slots: int
    before_us: float
    after_us: float
    gain: PairedGain
    copies: int
    copy_us: float
    memory_bytes: float
    weight_rows: int
    break_even_steps: float

    @property
    def pays(self) -> bool:
        """Whether the gain is above 0 at its level, and more than the model's error."""
        return self.gain.is_significant and self.gain.percent >= LEAST_PERCENT


@dataclass(frozen=True)
class Advice:
    """What `advise` found.

    Attributes:
        kind: the verdict.
        reason: why it does not pay, or why that is not known; "" where it pays.
        best: the trial that is recommended, or the nearest to one.
        trials: all of them.
        engine, gpu, model: names; `basis` and `source` of the kernels' constants.
        num_ranks: G.
        num_experts: E.
        top_k: experts of a token.
        held_out: what was planned and judged on.
        uneven: the default placement's rank loads beside a balanced router's.
    """

    kind: Kind
    reason: Reason
    best: Trial
    trials: tuple[Trial, ...]
    engine: Engine
    gpu: str
    basis: str
    source: str
    model: str
    num_ranks: int
    num_experts: int
    top_k: int
    held_out: HeldOut
    uneven: Unevenness


def advise(
    trace: Trace,
    *,
    engine: str | Engine,
    gpu: str = "H100",
    num_ranks: int,
    num_nodes: int | None = None,
    model: ModelShape | str | None = None,
    top_k: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    phases: Sequence[Phase] = ("decode", "prefill"),
    seed: int = 0,
) -> Advice:
    """Say whether balancing pays on this traffic and this hardware, in modeled time of the MoE layers.

    Plans are made on the first part of the recording and judged on the last (`evenmoe.evidence.hold_out`), on steps
    drawn by the loads of its parts. A gain is claimed at 1 % over all trials together.

    Args:
        trace: loads or tokens of one model.
        engine: which serves it; its replica rule decides, and evenmoe's own beside it.
        gpu: accelerator of `evenmoe.costs`, or "cpu".
        num_ranks: expert-parallel ranks.
        num_nodes: nodes; by default as many as the accelerator's usual nodes take.
        model: sizes of experts and rows; by default the trace's.
        top_k: experts of a token, if neither trace nor model says.
        batch_sizes: tokens of a step, over all ranks.
        phases: "decode", for steps of at most 128 tokens a rank, and "prefill".
        seed: of draws and planners.

    Raises:
        ConstraintError: an engine, accelerator, model or size that cannot be.
        MissingArgumentError: nothing says the sizes of the experts.

    >>> trace = Trace("made", np.tile(np.r_[900, np.full(63, 100)], (24, 16, 1)))
    >>> found = advise(trace, engine="vllm", num_ranks=8, model="olmoe-1b-7b", batch_sizes=[16384], phases=["prefill"])
    >>> found.kind, found.best.num_slots > 64, found.best.gain.percent > 10
    ('pays', True, True)
    """
    serving = ENGINES.get(engine)
    ranks = whole_number("num_ranks", num_ranks, 1)
    shape = shape_of(trace, model)
    if shape is None:
        rule = "must say how large experts and rows are"
        raise MissingArgumentError(
            "model", "not given, and the trace is of no known model", rule, f"name one of {', '.join(MODELS)}"
        )
    if shape.num_experts != trace.num_experts:
        fix = f"name the model of the trace, or pass the trace of {shape.name}"
        raise ConstraintError(
            "model", f"{shape.name}, of {shape.num_experts} experts", f"must have the trace's {trace.num_experts}", fix
        )
    for phase in phases:  # a type does not hold callers to it
        if phase not in ("decode", "prefill"):
            raise ConstraintError("phases", repr(phase), "must be kinds of steps", "use decode, prefill or both")
    sizes = tuple(whole_number("batch_sizes", size, 1) for size in batch_sizes)
    picks = trace.top_k or top_k or shape.top_k
    hardware = find_hardware(gpu)
    nodes = max(1, math.ceil(ranks / hardware.node_ranks)) if num_nodes is None else num_nodes
    if num_nodes is not None and (num_nodes < 1 or ranks % num_nodes):
        raise ConstraintError(
            "num_nodes", num_nodes, f"must divide the {ranks} ranks evenly", "leave it out, or use one that does"
        )
    load = within_range(as_load(trace.load))
    held = hold_out(load, trace.routing, trace.seq_start)
    least = -(-trace.num_experts // ranks) * ranks
    default = default_placement(trace.num_layers, trace.num_experts, ranks, least)
    variance = held.variance if held.unit == "assignments" else 1.0
    uneven = unevenness(rank_loads_of(load, default, "even"), variance=variance)
    study = _Study(held, default, serving, hardware.name if gpu != "cpu" else "cpu", shape, picks, nodes, seed)
    wanted: list[tuple[Phase, int]] = [
        (phase, size) for phase in phases for size in sizes if phase == "prefill" or size <= _DECODE_TOKENS * ranks
    ]
    if not wanted:
        fix = f"use sizes up to {_DECODE_TOKENS * ranks}, or phases=['prefill']"
        raise ConstraintError(
            "batch_sizes", list(sizes), f"must have one of at most {_DECODE_TOKENS} tokens a rank to judge decode", fix
        )
    trials = study.trials(wanted, least, hardware.memory_bytes)
    kind, reason, best = _verdict(trials, uneven)
    weight_bytes = 2.0 * shape.expert_bytes / shape.expert_flops_per_token
    fit = hardware.kernel(best.phase, weight_bytes)
    return Advice(
        kind, reason, best, trials, serving, hardware.name, fit.basis, fit.source, shape.name, ranks,
        trace.num_experts,
        picks,
        held, uneven,
    )  # fmt: skip


@dataclass(frozen=True)
class _Study:
    """What all trials share."""

    held: HeldOut
    default: Placement
    engine: Engine
    gpu: str
    shape: ModelShape
    top_k: int
    nodes: int
    seed: int

    def costs(self, phase: Phase) -> CostModel:
        sizes = self.shape.hidden, self.shape.expert_bytes, self.shape.expert_flops_per_token
        return CostModel.for_expert(*sizes, self.gpu, phase)

    def trials(self, wanted: list[tuple[Phase, int]], least: int, memory_bytes: float) -> tuple[Trial, ...]:
        ranks, layers = self.default.num_ranks, self.default.num_layers
        per_slot = layers * self.shape.expert_bytes
        extras = [
            extra
            for extra in range(_MOST_EXTRA + 1)
            if extra == 0 or (extra * per_slot <= MEMORY_SHARE * memory_bytes and extra < ranks)
        ]
        own = RULES.get(self.engine.rule)
        static: dict[tuple[int, str], Placement] = {}
        for extra in extras:
            static[extra, own.name] = self.plan(least + extra * ranks, own)
            if extra:
                static[extra, "batch"] = self.plan(least + extra * ranks, RULES.get("batch"))
        number = len(wanted) * (2 * len(extras) - 1 + 1)
        found = []
        for phase, tokens in wanted:
            costs = self.costs(phase)
            candidates: list[tuple[Placement, Rule, str]] = [
                (placement, RULES.get(name), "tokens") for (_, name), placement in static.items()
            ]
            rows = 0
            if phase == "decode" and least == self.default.num_experts:
                # Rows that take as long as one expert's weights, on this hardware.
                weights = self.shape.expert_bytes / costs.memory_bytes_per_s
                rows = round(weights * costs.flops_per_s / self.shape.expert_flops_per_token)
                options = PlanOptions(
                    ranks, least, objective="decode", tokens_per_step=tokens, top_k=self.top_k,
                    weight_rows=rows, seed=self.seed,
                )  # fmt: skip
                candidates.append((plan_with("evenmoe", self.held.planned.sum(axis=0), options), own, "decode"))
                candidates = [
                    (placement, BatchRule(rows) if rule.name == "batch" else rule, objective)
                    for placement, rule, objective in candidates
                ]
            found += self.compared(phase, tokens, costs, candidates, number, rows)
        return tuple(found)

    def plan(self, num_slots: int, rule: Rule) -> Placement:
        goal = self.held.planned if len(self.held.planned) > 1 else self.held.planned[0]
        if len(self.held.planned) > _MOST_WINDOWS:  # neighbors are merged, as `evenmoe plan` does
            first = np.arange(_MOST_WINDOWS) * len(self.held.planned) // _MOST_WINDOWS
            goal = np.add.reduceat(self.held.planned, first, axis=0)
        plan = plan_with("evenmoe", goal, PlanOptions(self.default.num_ranks, num_slots, rule=rule, seed=self.seed))
        return plan if self.engine.keeps_order else without_order(plan)

    def compared(
        self,
        phase: Phase,
        tokens: int,
        costs: CostModel,
        candidates: list[tuple[Placement, Rule, str]],
        number: int,
        rows: int,
    ) -> list[Trial]:
        draws = draw_rows(self.held.compared, tokens, self.top_k, np.random.default_rng((self.seed, tokens)))
        ranks, layers = self.default.num_ranks, self.default.num_layers
        fixed = exchange_us(tokens, ranks, self.top_k, costs)
        by_part = len(self.held.compared) >= FEWEST_WINDOWS or layers < FEWEST_LAYERS

        def parts(placement: Placement, rule: Rule) -> FloatArray:
            """Microseconds of every part of the recording, all layers; of every layer where there are too few."""
            times = Layout(placement, rule).times(draws, costs, np.random.default_rng((self.seed, tokens, 1))) + fixed
            each = times.reshape(-1, DRAWS, layers).mean(axis=1)
            return each.sum(axis=1) if by_part else each.mean(axis=0)

        own = RULES.get(self.engine.rule)
        before = parts(self.default, own)
        found = []
        for placement, rule, objective in candidates:
            after = parts(placement, rule)
            gain = paired_gain(before, after, comparisons=number, variance=self.held.variance)
            routes = route_copies(self.default, placement, ranks // self.nodes if ranks % self.nodes == 0 else ranks)
            copy_us = costs.copy_time(*routes)
            whole = (float(times.mean()) * (1 if by_part else layers) for times in (before, after))
            before_us, after_us = whole
            saved = before_us - after_us
            extra = placement.num_slots - self.default.num_slots
            found.append(
                Trial(
                    phase,
                    tokens,
                    objective,
                    rule.name,
                    self.engine.can_run(rule.name),
                    placement.num_slots,
                    before_us,
                    after_us,
                    gain,
                    int(count_copies(self.default, placement).sum()),
                    copy_us,
                    extra / ranks * layers * self.shape.expert_bytes,
                    rows if objective == "decode" or isinstance(rule, BatchRule) else 0,
                    copy_us / saved if saved > 0 else math.inf,
                )
            )
        return found


def _verdict(trials: tuple[Trial, ...], uneven: Unevenness) -> tuple[Kind, Reason, Trial]:
    """The verdict on all trials that the engine can run, and the one to recommend: of those that pay the fastest."""
    runs = [trial for trial in trials if trial.runs]
    best = max(runs, key=lambda trial: (trial.pays, trial.gain.percent))
    if not uneven.is_uneven:
        if 100 * (uneven.total_limit - 1) > LEAST_PERCENT and uneven.total_par > 1 + LEAST_PERCENT / 100:
            return "too close to call", "not enough evidence", best
        return "does not pay", "too balanced", best
    if best.pays:
        alike = [trial for trial in runs if trial.pays and trial.gain.percent > best.gain.percent - 1.0]
        return "pays", "", min(alike, key=lambda trial: (trial.memory_bytes, -trial.gain.percent))
    if best.gain.is_significant:
        return "too close to call", "the model cannot tell", best
    if best.gain.upper < LEAST_PERCENT:
        return "does not pay", _why(runs), best
    if best.gain.percent >= LEAST_PERCENT or not math.isfinite(best.gain.upper):
        return "too close to call", "not enough evidence", best
    return "does not pay", _why(runs), best


def _why(runs: list[Trial]) -> Reason:
    """The reason: times that hardly depend on placement, extra slots that cost, or a load that changed."""
    spread = max(abs(trial.gain.percent) for trial in runs)
    if spread < 1.0:
        return "not enough tokens"
    extra = [trial for trial in runs if trial.memory_bytes > 0]
    if all(trial.phase == "decode" for trial in runs) and extra and max(t.gain.percent for t in extra) < 0:
        return "decode reads more weights"
    return "does not last"
