"""A simulation as it is shown: in JSON, tables, notebooks and figures, and by its headline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from evenmoe.engines import ENGINES
from evenmoe.errors import require
from evenmoe.quantities import QUANTITIES, Shown
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.figures import find_figure
from evenmoe.simulator.frames import data_frame, html_table
from evenmoe.simulator.headline import Headline, find_headline
from evenmoe.simulator.replayed import PolicySummary, Replayed, summarize

if TYPE_CHECKING:
    from pathlib import Path

    import pandas
    from matplotlib.figure import Figure

    from evenmoe.engines.engine import Engine

#: Figures of policies in a notebook's table.
_IN_NOTEBOOKS = ("mean_par", "net_time_us", "net_gain_percent", "copies", "extra_memory_percent")


@dataclass(frozen=True, repr=False)
class Simulation(Replayed):
    """All policies on the same steps, to be shown; what was found is in the fields of `Replayed`."""

    def __repr__(self) -> str:
        names = ", ".join(policy.name for policy in self.policies)
        return f"Simulation({self.trace!r}, steps={len(self.tokens)}, ranks={self.num_ranks}, policies=[{names}])"

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline, and a table of all policies."""
        shown = [self.summary.shown(name) for name in _IN_NOTEBOOKS]
        heads = [f"{QUANTITIES[name].label}, {one.unit}" for name, one in zip(_IN_NOTEBOOKS, shown, strict=True)]
        columns = [[policy.name for policy in self.policies], *(one.texts for one in shown)]
        if self.engine is not None:
            heads.append(f"On {self.engine.name}")
            columns.append(self.summary.runs)
        rows = [list(row) for row in zip(*columns, strict=True)]
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

    def seen_for(self, engine: Engine | str) -> Simulation:
        """The same replay looked at for a serving engine: the headline is of those policies that it can run.

        Its own balancer is among them where the replay was for it.

        Args:
            engine: of `evenmoe.engines.ENGINES`, or its name.

        Raises:
            ConstraintError: there is none of that name.
        """
        return replace(self, engine=EngineView.of(ENGINES.get(engine)))

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

    @cached_property
    def summary(self) -> Summary:
        """The figures that are shown, computed once."""
        policies = tuple(summarize(self, policy) for policy in self.policies)
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
            engine=self.engine,
            policies=policies,
        )


@dataclass(frozen=True)
class Summary:
    """What a simulation found, in the figures that are shown; its attributes are the keys of `simulate --json`.

    Attributes:
        trace, num_ranks, num_nodes, num_experts, top_k, notes, engine: as in `Simulation`.
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
    engine: EngineView | None
    policies: tuple[PolicySummary, ...]

    def shown(self, name: str) -> Shown:
        """One figure of every policy as it is written wherever it stands."""
        quantity = QUANTITIES[name]
        family = [other.name for other in QUANTITIES.values() if other.family and other.family == quantity.family]
        return quantity.shown(self._values(name), [value for other in family for value in self._values(other)])

    @property
    def runs(self) -> tuple[str, ...]:
        """For each policy, "yes" or why the engine that the replay is looked at for cannot run it."""
        return tuple(f"no: {policy.cannot_run}" if policy.cannot_run else "yes" for policy in self.policies)

    def as_json(self) -> dict[str, object]:
        """The object of `simulate --json`."""
        return asdict(self)

    def _values(self, name: str) -> list[float]:
        return [getattr(policy, name) for policy in self.policies]
