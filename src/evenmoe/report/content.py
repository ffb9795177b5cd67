"""What a report is made of: the replay, its figures, and what it was made by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evenmoe.quantities import QUANTITIES
from evenmoe.report.charts import lines_legend
from evenmoe.report.markup import Column, Markup, data, name, table
from evenmoe.simulator.policy_result import PolicyResult
from evenmoe.simulator.replayed import PolicySummary
from evenmoe.simulator.result import Simulation, Summary


@dataclass(frozen=True)
class Content:
    """A simulation and where it came from.

    Attributes:
        simulation: what was found.
        command: the command line that made the page.
        inputs: SHA-256 of every file that it read, in hexadecimal, by path.
    """

    simulation: Simulation
    command: str
    inputs: dict[str, str]

    @property
    def summary(self) -> Summary:
        return self.simulation.summary

    @property
    def summaries(self) -> tuple[PolicySummary, ...]:
        return self.summary.policies

    @cached_property
    def best(self) -> int:
        """Index of the headline's policy."""
        return [policy.name for policy in self.summaries].index(self.summary.best_policy)

    @property
    def before(self) -> PolicyResult:
        """The baseline."""
        return self.simulation.policies[0]

    @property
    def after(self) -> PolicyResult:
        """The headline's policy; the baseline if it is alone."""
        return self.simulation.policies[self.best]

    @property
    def compares(self) -> bool:
        return self.best != 0

    @cached_property
    def focus(self) -> list[int]:
        """Indices of the policies to look at: the baseline, the headline's, the best with a rule that engines have."""
        names, said = [policy.name for policy in self.summaries], self.summary.headline
        wanted = [0, self.best] + ([] if said.engine_policy is None else [names.index(said.engine_policy)])
        return list(dict.fromkeys(wanted))

    @cached_property
    def layer_par(self) -> npt.NDArray[np.float64]:
        """(policies, L), mean over steps."""
        return np.array([policy.mean_par_per_layer for policy in self.summaries])

    @cached_property
    def worst_layer(self) -> int:
        """The layer with the highest mean PAR under the baseline."""
        return int(self.layer_par[0].argmax())

    @property
    def names(self) -> list[tuple[int, str]]:
        """(index, name) of every policy."""
        return [(i, policy.name) for i, policy in enumerate(self.simulation.policies)]

    def legend(self, policies: Sequence[int]) -> Markup:
        """Which line is which, of these policies: those to look at by name, the others together."""
        shown = [(i, text) for i, text in self.names if i in policies and i in self.focus]
        return lines_legend(shown, others=len(shown) < len(policies))

    def with_unit(self, quantity: str) -> list[str]:
        """One figure of every policy as it is written, with the unit without what it is per."""
        shown = self.summary.shown(quantity)
        return [f"{text} {shown.unit.partition(' per ')[0]}" for text in shown.texts]

    def table(self, caption: str, quantities: Sequence[str], policies: Sequence[str] = ()) -> Markup:
        """Figures of all policies, one row for each; `policies` are the rows' heads, their names by default.

        Where heads are given, the last column says whether the engine can run the policy.
        """
        columns, cells = [Column("Policy")], [policies or [name(policy.name) for policy in self.summaries]]
        for key in quantities:
            shown = self.summary.shown(key)
            columns.append(Column(QUANTITIES[key].label, shown.unit, key))
            values = [getattr(policy, key) for policy in self.summaries]
            cells.append([data(value, text) for value, text in zip(values, shown.texts, strict=True)])
        if policies and self.summary.engine is not None:
            columns.append(Column(f"On {self.summary.engine.name}", text=True))
            cells.append(self.summary.runs)
        return table(caption, columns, zip(*cells, strict=True))
