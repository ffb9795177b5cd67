"""What a replay found: plain arrays with units, and the figures of them that JSON, tables and the page show.

Axes: N steps, L layers, G ranks, S slots, E logical experts. A row is one token's hidden vector on its way to one
expert or, deduplicated, to one rank.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.errors import require
from evenmoe.quantities import QUANTITIES, Shown
from evenmoe.simulator.figures import find_figure
from evenmoe.simulator.frames import data_frame, html_table
from evenmoe.simulator.headline import Headline, find_headline
from evenmoe.simulator.policy_result import PolicyResult

if TYPE_CHECKING:
    from pathlib import Path

    import pandas
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Figures of policies in a notebook's table.
_IN_NOTEBOOKS = ("mean_par", "net_time_us", "net_gain_percent", "copies", "extra_memory_percent")


@dataclass(frozen=True, repr=False)
class Simulation:
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

    def __repr__(self) -> str:
        names = ", ".join(policy.name for policy in self.policies)
        return f"Simulation({self.trace!r}, steps={len(self.tokens)}, ranks={self.num_ranks}, policies=[{names}])"

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline, and a table of all policies."""
        shown = [self.summary.shown(name) for name in _IN_NOTEBOOKS]
        heads = [f"{QUANTITIES[name].label}, {one.unit}" for name, one in zip(_IN_NOTEBOOKS, shown, strict=True)]
        names = [policy.name for policy in self.policies]
        rows = [list(row) for row in zip(names, *(one.texts for one in shown), strict=True)]
        headline = self.summary.headline
        return html_table(headline.sentence, ["Policy", *heads], rows, (*headline.details, headline.measured_on))

    def to_dict(self) -> dict[str, object]:
        """The figures under the keys of `simulate --json` (docs/json.md); those that are not finite as they are."""
        return self.summary.as_json()

    def to_dataframe(self, per: str = "policy") -> pandas.DataFrame:
        """The figures of every policy as a data frame; needs pandas.

        Args:
            per: "policy" for one row each, with the keys of `simulate --json`, indexed by its name; "step" for one row
                per policy and step: mean and highest PAR of the layers, microseconds of the step and of the copying
                that begins before it, copies; "layer" for one row per policy and layer: the mean PAR.

        Raises:
            ConstraintError: pandas is not installed, or another `per`.
        """
        if per == "policy":
            rows = [asdict(policy) for policy in self.summary.policies]
            return data_frame({key: [row[key] for row in rows] for key in rows[0]}, "name")
        require(per in ("step", "layer"), "per", repr(per), "must be policy, step or layer", "use one of them")
        number = len(self.tokens) if per == "step" else len(self.load)
        names = np.repeat([policy.name for policy in self.policies], number)
        columns: dict[str, object] = {"policy": names, per: np.tile(np.arange(number), len(self.policies))}
        if per == "layer":
            par = [policy.mean_par_per_layer for policy in self.summary.policies]
            return data_frame({**columns, "mean_par": np.concatenate(par)}, "policy")
        for key, each in (
            ("mean_par", [policy.par.mean(axis=1) for policy in self.policies]),
            ("worst_par", [policy.par.max(axis=1) for policy in self.policies]),
            ("step_time_us", [policy.step_time for policy in self.policies]),
            ("copy_time_us", [policy.copy_time for policy in self.policies]),
            ("copies", [policy.copies.sum(axis=1) for policy in self.policies]),
        ):
            columns[key] = np.concatenate(each)
        return data_frame(columns, "policy")

    def save(self, path: str | Path) -> None:
        """Write everything to a file that `evenmoe report` and `evenmoe.load_simulation` read."""
        from evenmoe import save_simulation  # what is stored stands above what it stores

        save_simulation(self, path)

    def plot(self, figure: str, **look: object) -> Figure:
        """Draw one of `simulator.figures.FIGURES`, py:module:function included, as a matplotlib Figure.

        Args:
            figure: its name.
            look: `width` and `height` in inches, `style` as matplotlib.style.use takes it.

        Raises:
            ConstraintError: no such figure, or matplotlib is not installed.
        """
        return find_figure(figure)(self, **look)

    def plot_par(self, **look: object) -> Figure:
        """Draw the peak-to-average load of the median layer over the steps; see `plot`."""
        return self.plot("par", **look)

    def plot_loads(self, **look: object) -> Figure:
        """Draw the load of every rank and layer before and after, over the layer's mean rank; see `plot`."""
        return self.plot("load", **look)

    def plot_replicas(self, **look: object) -> Figure:
        """Draw the replicas of every expert and layer after the last step; see `plot`."""
        return self.plot("replicas", **look)

    def plot_traffic(self, **look: object) -> Figure:
        """Draw the token rows that leave their rank in a mean step; see `plot`."""
        return self.plot("traffic", **look)

    def plot_time(self, **look: object) -> Figure:
        """Draw the modeled time of a mean step; see `plot`."""
        return self.plot("time", **look)

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

    @cached_property
    def summary(self) -> Summary:
        """The figures that are shown, computed once."""
        policies = tuple(_summarize(self, policy) for policy in self.policies)
        headline = find_headline(self, policies)
        return Summary(
            trace=self.trace,
            num_steps=len(self.tokens),
            num_ranks=self.num_ranks,
            num_nodes=self.num_nodes,
            num_layers=self.load.shape[0],
            num_experts=self.num_experts,
            top_k=self.top_k,
            tokens_per_step=int(self.tokens[0]),
            num_empty_windows=self.empty_windows,
            num_warmup_steps=self.num_warmup_steps,
            num_judged_steps=self.num_judged_steps,
            horizon_steps=self.horizon_steps,
            copy_overlap=self.copy_overlap,
            best_policy=headline.policy,
            headline=headline,
            settings=tuple({"name": name, "value": value, "unit": unit} for name, value, unit in self.settings),
            notes=self.notes,
            policies=policies,
        )


@dataclass(frozen=True)
class PolicySummary:
    """One policy in a few figures.

    Attributes:
        name, description, rule: as in `PolicyResult`.
        num_slots: of the last placement.

    Every other attribute is defined in `evenmoe.quantities.QUANTITIES`; nan stands for a quotient of nothing, inf for
    never.
    """

    name: str
    description: str
    rule: str
    num_slots: int
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


@dataclass(frozen=True)
class Summary:
    """What a simulation found, in the figures that are shown; its attributes are the keys of `simulate --json`.

    Attributes:
        trace, num_ranks, num_nodes, num_experts, top_k, notes: as in `Simulation`.
        num_steps, num_layers: N and L.
        tokens_per_step: of the first step, over all ranks.
        num_empty_windows: windows of the trace that were left out because nothing was recorded in them.
        num_warmup_steps, num_judged_steps, horizon_steps, copy_overlap: as in `Simulation`.
        best_policy: the name of the headline's policy.
        headline: the one figure that counts, with what it was measured on.
        settings: name, value and unit of everything that was chosen.
        policies: in the simulation's order; the first is the baseline.
    """

    trace: str
    num_steps: int
    num_ranks: int
    num_nodes: int
    num_layers: int
    num_experts: int
    top_k: int
    tokens_per_step: int
    num_empty_windows: int
    num_warmup_steps: int
    num_judged_steps: int
    horizon_steps: int
    copy_overlap: bool
    best_policy: str
    headline: Headline
    settings: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    policies: tuple[PolicySummary, ...]

    def shown(self, name: str) -> Shown:
        """One figure of every policy as it is written wherever it stands."""
        quantity = QUANTITIES[name]
        family = [other.name for other in QUANTITIES.values() if other.family and other.family == quantity.family]
        return quantity.shown(self._values(name), [value for other in family for value in self._values(other)])

    def as_json(self) -> dict[str, object]:
        """The object of `simulate --json`."""
        return asdict(self)

    def _values(self, name: str) -> list[float]:
        return [getattr(policy, name) for policy in self.policies]


def _summarize(simulation: Simulation, policy: PolicyResult) -> PolicySummary:
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
