"""Which rank sends which expert when a placement is replaced."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.placement import Placement

IntArray = npt.NDArray[np.int64]


def route_copies(previous: Placement, placement: Placement, ranks_per_node: int) -> tuple[IntArray, IntArray]:
    """Experts that each rank sends and receives, all layers together: two int64 (2, G), within and between nodes.

    Layer by layer and slot by slot, an expert that was not on its new rank is sent by a rank that held it: one of the
    same node if there is any, and of those the one that has sent the fewest so far over that link, then the lowest.

    Ranks 0 and 1 swap experts 1 and 2:

    >>> sent, received = route_copies(Placement([[0, 1, 2, 3]], 2), Placement([[0, 2, 1, 3]], 2), 2)
    >>> sent.tolist(), received.tolist()
    ([[1, 1], [0, 0]], [[1, 1], [0, 0]])
    """
    num_ranks = placement.num_ranks
    sent, received = np.zeros((2, num_ranks), np.int64), np.zeros((2, num_ranks), np.int64)
    ranks = np.arange(num_ranks)
    width = placement.slots_per_rank
    for layer in range(placement.num_layers):
        held = np.zeros((placement.num_experts, num_ranks), bool)
        held[previous.slot_to_expert[layer], np.arange(previous.num_slots) // previous.slots_per_rank] = True
        experts = placement.slot_to_expert[layer]
        for slot in np.flatnonzero(~held[experts, np.arange(placement.num_slots) // width]):
            target = slot // width
            holders = ranks[held[experts[slot]]]
            near = holders[holders // ranks_per_node == target // ranks_per_node]
            link, sources = (0, near) if near.size else (1, holders)
            sent[link, sources[np.argmin(sent[link, sources])]] += 1
            received[link, target] += 1
    return sent, received
