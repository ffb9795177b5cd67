"""A new plan laid over the placement in use, so that as little as possible moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.placement import Placement


def rename_ranks(new: Placement, previous: Placement, num_nodes: int = 1) -> Placement:
    """Nodes are alike, and the ranks of one, so each of `new` is put where most of its experts are already.

    >>> rename_ranks(Placement([[2, 3, 0, 1]], 2), Placement([[0, 1, 2, 3]], 2)).slot_to_expert.tolist()
    [[0, 1, 2, 3]]
    """
    num_ranks, width, node_ranks = new.num_ranks, new.slots_per_rank, new.num_ranks // num_nodes
    ranks = np.empty((new.num_layers, num_ranks), np.int64)  # the rank of `new` that each rank gets
    for layer in range(new.num_layers):
        held = np.zeros((num_ranks, new.num_experts), np.int64)
        held[np.arange(num_ranks)[:, None], previous.slot_to_expert[layer].reshape(num_ranks, width)] = 1
        common = held[:, new.slot_to_expert[layer].reshape(num_ranks, width)].sum(axis=2)
        common = common.reshape(num_nodes, node_ranks, num_nodes, node_ranks)
        for node, taken in _best_pairs(common.sum(axis=(1, 3))):
            for rank, other in _best_pairs(common[node, :, taken]):
                ranks[layer, node * node_ranks + rank] = taken * node_ranks + other
    slots = (ranks[:, :, None] * width + np.arange(width)).reshape(new.num_layers, -1)
    return Placement(
        np.take_along_axis(new.slot_to_expert, slots, axis=1),
        num_ranks,
        num_experts=new.num_experts,
        replica_index=np.take_along_axis(new.replica_index, slots, axis=1),
    )


def _best_pairs(common: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Every row with a column of its own, those that have most in common first.

    >>> _best_pairs(np.array([[1, 5], [3, 4]]))
    [(0, 1), (1, 0)]
    """
    rows, columns = np.nonzero(common)
    order = np.argsort(-common[rows, columns], kind="stable")
    column_of, row_of = [-1] * len(common), [-1] * len(common)
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if column_of[row] < 0 and row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    left = iter([column for column, row in enumerate(row_of) if row < 0])
    return [(row, next(left) if column < 0 else column) for row, column in enumerate(column_of)]
