"""What a replay found of one policy: plain arrays with units, whose axes are those of `simulator.result`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.placement import Placement

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """Rows that leave their source rank, summed over layers; int64 (N,) each.

    Attributes:
        within_node: to another rank of the same node, one row per (token, expert).
        between_nodes: to another node, one row per (token, expert).
        within_node_once: as within_node, one row per (token, destination rank).
        between_nodes_once: as between_nodes, one row per (token, destination rank).
    """

    within_node: IntArray
    between_nodes: IntArray
    within_node_once: IntArray
    between_nodes_once: IntArray


@dataclass(frozen=True)
class Details:
    """Every step and layer of one policy, kept on request.

    Attributes:
        rank_loads: int64 (N, L, G), rows that each rank computed.
        rows: float64 (N, L, 4), token rows communicated, in the order of `Traffic`'s fields; whole numbers where the
            trace says which expert every token chose, else the last two are expected values.
    """

    rank_loads: IntArray
    rows: FloatArray


@dataclass(frozen=True)
class PolicyResult:
    """One policy over all steps.

    Attributes:
        name: as given to `--policy`, unique in a simulation.
        description: one sentence: planner, rule, when it is refreshed.
        rule: replica rule, "rank", "token", "occurrence", "batch" or "even".
        par: float64 (N, L), peak-to-average load of the ranks.
        rank_tokens: int64 (L, G), rows computed by each rank, all judged steps together.
        copies: int64 (N, L), experts whose copying begins before each step.
        refreshes: int64 (R,), the steps before which copies for another placement begin.
        traffic: token rows communicated.
        step_time: float64 (N,), microseconds of one step: all layers, the busiest rank of each, and the exchange.
        copy_time: float64 (N,), microseconds of the copying that begins before each step.
        initial, final: the placements of the first and the last step.
        memory_per_rank: int, bytes of expert weights on the rank that has most, all layers.
        break_even_steps: float, steps after which a mean refresh has paid for its copies, compared with the default
            placement; inf when it never does, 0.0 when nothing is copied.
        details: or None where they were not asked for.
        own_of: name of the engine whose own balancer it is, "" of none.
    """

    name: str
    description: str
    rule: str
    par: FloatArray
    rank_tokens: IntArray
    copies: IntArray
    refreshes: IntArray
    traffic: Traffic
    step_time: FloatArray
    copy_time: FloatArray
    initial: Placement
    final: Placement
    memory_per_rank: int
    break_even_steps: float
    details: Details | None = None
    own_of: str = ""

    @property
    def sees_future(self) -> bool:
        """Whether the policy plans from the loads that it is then measured on."""
        return self.name.split(":")[0] == "oracle"

    @property
    def first_copy_time(self) -> float:
        """Microseconds of copying for the first change of the placement; 0.0 without one."""
        return float(self.copy_time[self.refreshes[:1]].sum())

    @property
    def later_copy_time(self) -> FloatArray:
        """Microseconds of the copying before each step, float64 (N,), that of the first change left out."""
        later = self.copy_time.copy()
        later[self.refreshes[:1]] = 0.0
        return later
