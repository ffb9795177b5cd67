"""`Engine`: what a serving engine reads, how it chooses replicas, and how it balances by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenmoe.evidence import HeldOut, PairedGain, centered_on, par_gain
from evenmoe.metrics import FloatArray, peak_over_mean
from evenmoe.placement import Placement
from evenmoe.planner.judging import rank_loads_of
from evenmoe.planner.options import PlanOptions
from evenmoe.planner.plan import plan_with
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule


@dataclass(frozen=True)
class Engine:
    """One serving engine.

    Attributes:
        name: as `plan --for` takes it.
        version: release or commit from whose source the rest was read.
        format: name of the placement format that it reads.
        suffixes: endings of a file's name that it takes; () for any.
        rule: the rule by which its ranks choose replicas, or the one whose shares are the expected ones of its own.
        choice: how it chooses, in its own terms.
        runs: names of further rules that it can be told to choose by.
        loads_file: whether it starts from a placement in a file.
        takes_plans: whether it takes plans of others while it serves.
        uneven: whether its ranks may have different numbers of slots.
        keeps_order: whether its format stores the order of an expert's replicas; else it is that of the slots.
        options: what goes into its launch command or configuration; `{path}`, `{ranks}`, `{slots}` and `{redundant}`
            stand for the file, the ranks, the slots of a layer, and the slots beyond one per expert.
        balancer: the planner that stands for its own balancer.
        balancer_words: which balancer that is.
        window: steps that its balancer looks back; None for all.
        interval: steps from one rebalancing to the next, by default; None for none after the start.
        notes: what else a user must know.
    """

    name: str
    version: str
    format: str
    rule: str | Rule
    choice: str
    options: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    loads_file: bool = True
    takes_plans: bool = False
    uneven: bool = False
    keeps_order: bool = False
    balancer: str = "greedy"
    balancer_words: str = "the published greedy balancer"
    window: int | None = None
    interval: int | None = None
    notes: tuple[str, ...] = ()

    def launch(self, path: str, num_ranks: int, num_slots: int, num_experts: int) -> tuple[str, ...]:
        """The options with their values.

        >>> from evenmoe.engines import ENGINES
        >>> ENGINES.get("sglang").launch("p.json", 8, 72, 64)[-1]
        '--init-expert-location p.json'
        """
        values = {"path": path, "ranks": num_ranks, "slots": num_slots, "redundant": num_slots - num_experts}
        return tuple(_filled(option, values) for option in self.options)

    def can_run(self, rule: str) -> bool:
        """Whether its ranks choose by a rule with the same shares: nothing but evenmoe itself can by "batch".

        >>> from evenmoe.engines import ENGINES
        >>> [ENGINES.get(name).can_run("batch") for name in ("vllm", "evenmoe")]
        [False, True]
        """
        mine, theirs = [RULES.get(each) for each in (self.rule, *self.runs)], RULES.get(rule)
        return theirs in mine or (rule == "even" and any(each.shares_evenly for each in mine))

    @property
    def pace(self) -> str:
        """When its own balancer plans.

        >>> from evenmoe.engines import ENGINES
        >>> ENGINES.get("vllm").pace, ENGINES.get("mindie").pace
        ('every 3,000 steps from the last 1,000', 'once')
        """
        if self.interval is None:
            return "once"
        past = "all before" if self.window is None else f"the last {self.window:,}"
        return f"every {self.interval:,} steps from {past}"


def _filled(option: str, values: dict[str, str | int]) -> str:
    for name, value in values.items():
        option = option.replace(f"{{{name}}}", str(value))  # not str.format: options hold JSON
    return option


@dataclass(frozen=True)
class OwnBalancer:
    """What an engine's own balancer does to the judged part of a recording, beside a plan.

    Attributes:
        par: its mean PAR (L,) over the judged windows.
        plans: how often it planned.
        gain: by how much the plan's mean PAR is below its own.
    """

    par: FloatArray
    plans: int
    gain: PairedGain


def beside_own_balancer(engine: Engine, held: HeldOut, plan: Placement, options: PlanOptions) -> OwnBalancer:
    """Replay the engine's own balancer over the judged windows, each taken for a step, and compare a plan with it.

    It plans before the first of them from the last windows before, and again after every interval.

    Args:
        engine: whose rule and balancer are used.
        held: both parts of a recording.
        plan: planned on the first part.
        options: of the plan; rule and `previous` do not matter.
    """
    shape = PlanOptions(options.num_ranks, options.num_slots, options.num_nodes, options.num_groups)
    every, seen = engine.interval or len(held.judged), held.planned
    placements = []
    for first in range(0, len(held.judged), every):
        past = np.concatenate([seen, held.judged[:first]])[-(engine.window or len(seen) + first) :]
        placements.append(plan_with(engine.balancer, past.sum(axis=0), shape))
    own = np.concatenate(
        [
            rank_loads_of(held.judged[index * every : (index + 1) * every], placement, engine.rule)
            for index, placement in enumerate(placements)
        ]
    )
    gain = par_gain(own, rank_loads_of(held.judged, plan, engine.rule))
    if held.compared is not held.judged:
        parts = (rank_loads_of(held.compared, each, engine.rule) for each in (placements[-1], plan))
        gain = centered_on(par_gain(*parts, variance=held.variance), gain.percent)
    recorded = held.judged.any(axis=2)
    recorded |= ~recorded.any(axis=0)
    return OwnBalancer((peak_over_mean(own) * recorded).sum(axis=0) / recorded.sum(axis=0), len(placements), gain)
