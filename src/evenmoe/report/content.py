"""What a report is made of: the replay, its summaries, and what it was made by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evenmoe.report.summary import Summary, best_policy, summarise
from evenmoe.simulator.result import PolicyResult, Simulation


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

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        return summarise(self.simulation)

    @cached_property
    def best(self) -> int:
        return best_policy(self.simulation)

    @property
    def before(self) -> PolicyResult:
        """The baseline."""
        return self.simulation.policies[0]

    @property
    def after(self) -> PolicyResult:
        """The best policy; the baseline if it is alone."""
        return self.simulation.policies[self.best]

    @property
    def compares(self) -> bool:
        return self.best != 0

    @property
    def num_steps(self) -> int:
        return len(self.simulation.tokens)

    @property
    def num_layers(self) -> int:
        return self.before.par.shape[1]

    @cached_property
    def layer_par(self) -> npt.NDArray[np.float64]:
        """(policies, L), mean over steps."""
        return np.stack([policy.par.mean(axis=0) for policy in self.simulation.policies])

    @cached_property
    def worst_layer(self) -> int:
        """The layer with the highest mean PAR under the baseline."""
        return int(self.layer_par[0].argmax())

    @property
    def names(self) -> list[tuple[int, str]]:
        """(index, name) of every policy."""
        return [(i, policy.name) for i, policy in enumerate(self.simulation.policies)]
