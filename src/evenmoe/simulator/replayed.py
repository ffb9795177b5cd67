"""What a replay found: plain arrays with units, and each policy in the figures that are shown.

Axes: N steps, L layers, G ranks, S slots, E logical experts. A row is one token's hidden vector on its way to one
expert or, deduplicated, to one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.policy_result import PolicyResult

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replayed:
    """All policies on the same steps.

    Attributes:
        trace: name of the trace.
        settings: (name, value, unit or "") of everything that was chosen, the cost model's figures included, in the
            order to be shown.
        num_ranks, num_nodes, num_experts, top_k: int.
        tokens: int64 (N,), tokens of each step over all ranks.
        load: int64 (L, E), rows per logical expert, all judged steps together.
        policies: the first one is the baseline, the default placement.
        notes: sentences on what is exact and what is drawn or expected, to be shown with the numbers.
        empty_windows: int, windows of the trace that were left out because nothing was recorded in them.
        num_warmup_steps: int, steps before every policy has made its first plan.
        num_judged_steps: int, steps after them, up to the first that has a token which was replayed before; 0 where
            there are none, and figures are then of all steps.
        horizon_steps: int, steps over which the copies of a policy's first plan are charged.
        copy_overlap: whether experts are copied beside the steps.
        recorded_tokens: int, tokens of the trace.
        recorded_windows: int, windows that counts were drawn from; 0 where tokens are known.
        assignments_per_step: int, of a layer.
        recorded_assignments_per_step: float, those of a layer that a step's counts were drawn from; 0.0 where tokens
            are known.
        hardware: what times are modeled for, in words; "" where that is not known.
        first_plan: int, the step before which the last policy makes its first plan, where that is none of the steps;
            else 0.
        engine: the one that the replay is looked at for, or None.
    """

    trace: str
    settings: tuple[tuple[str, str, str], ...]
    num_ranks: int
    num_nodes: int
    num_experts: int
    top_k: int
    tokens: IntArray
    load: IntArray
    policies: tuple[PolicyResult, ...]
    notes: tuple[str, ...] = ()
    empty_windows: int = 0
    num_warmup_steps: int = 0
    num_judged_steps: int = 0
    horizon_steps: int = 3000
    copy_overlap: bool = False
    recorded_tokens: int = 0
    recorded_windows: int = 0
    assignments_per_step: int = 0
    recorded_assignments_per_step: float = 0.0
    hardware: str = ""
    first_plan: int = 0
    engine: EngineView | None = None

    @property
    def judged(self) -> slice:
        """The steps that figures are of."""
        if not self.num_judged_steps:
            return slice(0, len(self.tokens))
        return slice(self.num_warmup_steps, self.num_warmup_steps + self.num_judged_steps)

    def net_times(self, policy: PolicyResult) -> FloatArray:
        """Microseconds of each judged step with its share of copying, float64 (judged steps,).

        Copies between steps add their time: those of the first change of the placement spread over the horizon, later
        ones before their step. Copies beside the steps cost what the old placement takes longer meanwhile: the replay
        shows it of later changes, and for the first one the default placement serves as many steps of the horizon as
        its copies take.
        """
        judged = self.judged
        step, base = policy.step_time[judged], self.policies[0].step_time[judged]
        first = policy.first_copy_time
        if self.copy_overlap:
            horizon = float(base.mean()) * self.horizon_steps
            share = first / horizon if first < horizon else float(first > 0)
            return step + share * (base - step)
        return step + policy.later_copy_time[judged] + first / self.horizon_steps


@dataclass(frozen=True)
class PolicySummary:
    """One policy in a few figures.

    Attributes:
        name, description, rule: as in `PolicyResult`.
        num_slots: of the last placement.
        cannot_run: why the engine that the replay is looked at for cannot run it, in two or three words; None where it
            can, and without an engine.
        sees_future: whether it plans from the loads that it is then measured on.

    Every other attribute is defined in `evenmoe.quantities.QUANTITIES`; nan stands for a quotient of nothing, inf for
    never.
    """

    name: str
    description: str
    rule: str
    num_slots: int
    cannot_run: str | None
    mean_par: float
    worst_par: float
    mean_par_per_layer: list[float]
    step_time_us: float
    copy_time_us: float
    net_time_us: float
    total_copy_time_us: float
    refresh_copy_time_us: float
    gain_percent: float
    net_gain_percent: float
    copies: int
    refreshes: int
    copies_per_refresh: float
    break_even_steps: float
    rows_within_node: float
    rows_between_nodes: float
    deduplicated_rows_within_node: float
    deduplicated_rows_between_nodes: float
    deduplication_percent: float
    memory_bytes_per_rank: int
    extra_memory_bytes_per_rank: int
    extra_memory_percent: float

    @property
    def rows(self) -> float:
        """Rows that leave their rank, one for each token and expert."""
        return self.rows_within_node + self.rows_between_nodes

    @property
    def deduplicated_rows(self) -> float:
        """Rows that leave their rank, one for each token and destination rank."""
        return self.deduplicated_rows_within_node + self.deduplicated_rows_between_nodes

    @property
    def sees_future(self) -> bool:
        """Whether the policy plans from the loads that it is then measured on."""
        return self.name.split(":")[0] == "oracle"


def summarize(simulation: Replayed, policy: PolicyResult) -> PolicySummary:
    """The figures of one of its policies."""
    judged, baseline = simulation.judged, simulation.policies[0]
    copies, refreshes = int(policy.copies.sum()), len(policy.refreshes)
    par, step = policy.par[judged], float(policy.step_time[judged].mean())
    net, base_net = (float(simulation.net_times(each).mean()) for each in (policy, baseline))
    traffic = policy.traffic
    rows = [float(kind[judged].mean()) for kind in (traffic.within_node, traffic.between_nodes)]
    once = [float(kind[judged].mean()) for kind in (traffic.within_node_once, traffic.between_nodes_once)]
    memory, base_memory = int(policy.memory_per_rank), int(baseline.memory_per_rank)
    return PolicySummary(
        name=policy.name,
        description=policy.description,
        rule=policy.rule,
        num_slots=policy.final.num_slots,
        cannot_run=None if simulation.engine is None else simulation.engine.cannot_run(policy),
        mean_par=float(par.mean()),
        worst_par=float(par.max()),
        mean_par_per_layer=par.mean(axis=0).tolist(),
        step_time_us=step,
        copy_time_us=float(policy.later_copy_time[judged].mean()) + policy.first_copy_time / simulation.horizon_steps,
        net_time_us=net,
        total_copy_time_us=float(policy.copy_time.sum()),
        refresh_copy_time_us=float(policy.copy_time.sum() / refreshes) if refreshes else 0.0,
        gain_percent=_saved(step, float(baseline.step_time[judged].mean())),
        net_gain_percent=_saved(net, base_net),
        copies=copies,
        refreshes=refreshes,
        copies_per_refresh=copies / refreshes if refreshes else 0.0,
        break_even_steps=float(policy.break_even_steps),
        rows_within_node=rows[0],
        rows_between_nodes=rows[1],
        deduplicated_rows_within_node=once[0],
        deduplicated_rows_between_nodes=once[1],
        deduplication_percent=_saved(sum(once), sum(rows), 0.0),
        memory_bytes_per_rank=memory,
        extra_memory_bytes_per_rank=memory - base_memory,
        extra_memory_percent=100.0 * (memory - base_memory) / base_memory if base_memory else math.nan,
    )


def _saved(value: float, baseline: float, of_nothing: float = math.nan) -> float:
    """Per cent of the baseline that the value is below it."""
    return 100.0 * (1.0 - value / baseline) if baseline > 0 else of_nothing
