"""The published greedy planner (deepseek-ai/EPLB, and vLLM, SGLang and TensorRT-LLM after it), to compare with.

Written from its description. Global: every spare slot goes to the expert with the largest load per replica, then the
replicas, heaviest first, each go to the lightest rank with a free slot. Hierarchical: groups of experts are packed onto
nodes the same way, and every node replicates and packs on its own with an equal share of the slots. Nothing keeps two
replicas of an expert off one rank, and nothing looks at the placement in use.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import as_load, within_range
from evenmoe.placement import Placement
from evenmoe.planner.kernels.packing import pack_evenly, replicate
from evenmoe.planner.options import check_shape
from evenmoe.slot_arrays import sizes_text


def plan_greedy(
    load: npt.ArrayLike, *, num_ranks: int, num_slots: int, num_nodes: int = 1, num_groups: int = 1
) -> Placement:
    """Plan as the published greedy planner does; called as `evenmoe.plan` is.

    Args:
        load: tokens per logical expert, (L, E), or windows (T, L, E), which are added up.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        num_nodes: nodes that share the ranks evenly, in rank order.
        num_groups: with more than one of both, groups stay inside nodes as in `evenmoe.plan`.

    Returns:
        The placement. Equal loads are taken in ascending order of id.

    Raises:
        ConstraintError: counts that cannot work; the text names the nearest that do.

    >>> plan_greedy([[6, 1, 1]], num_ranks=2, num_slots=4).slot_to_expert.tolist()
    [[0, 1, 0, 2]]
    >>> shape = {"num_ranks": 2, "num_slots": 4, "num_nodes": 2, "num_groups": 4}
    >>> plan_greedy([[6, 4, 3, 1]], **shape).slot_to_expert.tolist()
    [[0, 3, 1, 2]]
    """
    tokens = within_range(as_load(load))
    tokens = tokens.sum(axis=0) if tokens.ndim == 3 else tokens
    shape = check_shape(tokens.shape[1], num_ranks, num_slots, num_nodes, num_groups)
    if shape.rank_sizes is not None:
        raise ConstraintError(
            "num_slots",
            f"[{sizes_text(shape.rank_sizes)}]",
            "must be one number for all ranks, none of them dead, for the greedy planner",
            "use evenmoe's own planner",
        )
    size = shape.num_experts // shape.num_groups
    slots = np.empty((len(tokens), shape.num_nodes, shape.node_slots), np.int32)
    for layer, row in enumerate(tokens):
        groups = pack_evenly(row.reshape(-1, size).sum(axis=1), shape.num_nodes)
        for node, members in enumerate(np.sort(groups, axis=1)):
            experts = (members[:, None] * size + np.arange(size)).ravel()
            owner, counts = replicate(row[experts], shape.node_slots, shape.node_slots)
            packed = pack_evenly(row[experts][owner] / counts[owner], shape.node_ranks)
            slots[layer, node] = experts[owner[packed]].ravel()
    return Placement(slots.reshape(len(tokens), -1), shape.num_ranks, num_experts=shape.num_experts)
