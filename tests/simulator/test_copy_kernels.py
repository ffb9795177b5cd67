"""Compiled routes of copies against the plain loop of their definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.placement import Placement
from evenmoe.simulator.costs import route_copies


def route_one_by_one(previous: Placement, placement: Placement, ranks_per_node: int):
    """What `route_copies` says, in its words: layer by layer, slot by slot."""
    num_ranks = placement.num_ranks
    sent, received = ([[0] * num_ranks for _ in range(2)] for _ in range(2))
    for before, after in zip(previous.slot_to_expert.tolist(), placement.slot_to_expert.tolist(), strict=True):
        for slot, expert in enumerate(after):
            target = slot // placement.slots_per_rank
            holders = sorted({at // previous.slots_per_rank for at, held in enumerate(before) if held == expert})
            if target in holders:
                continue
            near = [rank for rank in holders if rank // ranks_per_node == target // ranks_per_node]
            link = 0 if near else 1
            source = min(near or holders, key=lambda rank: (sent[link][rank], rank))
            sent[link][source] += 1
            received[link][target] += 1
    return sent, received


@st.composite
def changes(draw):
    """Two placements of one model on the same ranks, in slots of their own, and ranks per node."""
    ranks, layers = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    widths = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * min(widths)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placements = []
    for width in widths:
        more = rng.integers(0, experts, (layers, ranks * width - experts))
        slots = np.concatenate([np.tile(np.arange(experts), (layers, 1)), more], axis=1)
        placements.append(Placement(rng.permuted(slots, axis=1), ranks, num_experts=experts))
    return *placements, draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))


@settings(deadline=None)
@given(changes())
def test_routes_are_those_of_the_loop(change):
    sent, received = route_copies(*change)
    assert (sent.tolist(), received.tolist()) == route_one_by_one(*change)


def test_a_hot_expert_is_sent_by_its_holders_in_turn():
    before = Placement([[0, 1, 0, 2, 3, 4]] * 3, 6)  # expert 0 on ranks 0 and 2
    after = Placement([[0, 0, 1, 2, 3, 4], [0, 1, 0, 2, 3, 4], [0, 1, 2, 0, 3, 4]], 6)
    for near in (1, 2, 3, 6):
        sent, received = route_copies(before, after, near)
        assert (sent.tolist(), received.tolist()) == route_one_by_one(before, after, near)
