"""What is compiled of copies: which rank sends an expert to a rank that does not hold it yet."""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled


@compiled
def count_routes(old, new, num_ranks, ranks_per_node, num_experts, sent, received):
    """Add up the experts that every rank sends and receives, as `costs.route_copies` defines them.

    Args:
        old: int32 (L, S'), the expert in each slot before.
        new: int32 (L, S), and after; both have as many slots on every rank.
        num_ranks: G.
        ranks_per_node: of which nodes are made in rank order.
        num_experts: E.
        sent, received: int64 (2, G), within and between nodes; added to.
    """
    old_width, new_width = old.shape[1] // num_ranks, new.shape[1] // num_ranks
    held = np.empty((num_experts, num_ranks), np.bool_)
    for layer in range(new.shape[0]):
        held[:] = False
        for slot in range(old.shape[1]):
            held[old[layer, slot], slot // old_width] = True
        for slot in range(new.shape[1]):
            target = slot // new_width
            holds = held[new[layer, slot]]
            if holds[target]:
                continue
            node = target // ranks_per_node * ranks_per_node
            link, source = 0, _least_used(sent[0], holds, node, node + ranks_per_node)
            if source < 0:
                link, source = 1, _least_used(sent[1], holds, 0, num_ranks)
            sent[link, source] += 1
            received[link, target] += 1


@compiled
def _least_used(sent, holds, begin, end):
    """The first of the ranks from `begin` to `end` that hold the expert and have sent the fewest; -1 for none."""
    least = -1
    for rank in range(begin, end):
        if holds[rank] and (least < 0 or sent[rank] < sent[least]):
            least = rank
    return least
