"""What a replay found: plain arrays with units, which reports and JSON are made of.

Axes: N steps, L layers, G ranks, S slots, E logical experts. A row is one token's hidden vector on its way to one
expert or, deduplicated, to one rank.
"""

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
        rows: float64 (N, L, 4), rows on the wire in the order of `Traffic`'s fields; whole numbers where the trace
            says which expert every token chose, else the last two are expected values.
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
        rank_tokens: int64 (L, G), rows computed by each rank, all steps together.
        copies: int64 (N, L), experts copied before each step.
        refreshes: int64 (R,), the steps before which the placement was replaced (not the first placement).
        traffic: rows on the wire.
        step_time: float64 (N,), microseconds of one step: all layers, the busiest rank of each, and the wire.
        copy_time: float64 (N,), microseconds spent copying before each step.
        initial, final: the placements of the first and the last step.
        memory_per_rank: int, bytes of expert weights on a rank, all layers.
        break_even_steps: float, steps after which a mean refresh has paid for its copies, compared with the identity
            placement; inf when it never does, 0.0 when nothing is copied.
        details: or None where they were not asked for.
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


@dataclass(frozen=True)
class Simulation:
    """All policies on the same steps.

    Attributes:
        trace: name of the trace.
        settings: (name, value, unit or "") of everything that was chosen, the cost model's figures included, in the
            order to be shown.
        num_ranks, num_nodes, num_experts, top_k: int.
        tokens: int64 (N,), tokens of each step over all ranks.
        load: int64 (L, E), rows per logical expert, all steps together.
        policies: the first one is the static baseline, "identity".
        notes: sentences on what is exact and what is drawn or expected, to be shown with the numbers.
        empty_windows: int, windows of the trace that were left out because nothing was recorded in them.
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
