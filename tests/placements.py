"""Random placements for the tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from evenmoe.placement import Placement


def random_placement(rng: np.random.Generator, layers: int, experts: int, ranks: int, per_rank: int) -> Placement:
    """Every expert somewhere, the other slots at random, the replicas of an expert in any order in its table row."""
    slots = ranks * per_rank
    held = np.array([[*range(experts), *rng.integers(0, experts, slots - experts)] for _ in range(layers)])
    held = rng.permuted(held, axis=1)
    order = np.zeros_like(held)
    for layer, expert in np.ndindex(layers, experts):
        where = np.nonzero(held[layer] == expert)[0]
        order[layer, where] = rng.permutation(len(where))
    return Placement(held, ranks, num_experts=experts, replica_index=order)


@st.composite
def placements(draw: st.DrawFn, layers: int | None = None, ranks: int | None = None) -> Placement:
    """1 to 8 ranks of 1 to 5 slots, so that one rank, one slot, one expert and many replicas all occur."""
    ranks = draw(st.integers(1, 8)) if ranks is None else ranks
    per_rank = draw(st.integers(1, 5))
    experts = draw(st.integers(1, ranks * per_rank))
    layers = draw(st.integers(1, 3)) if layers is None else layers
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_placement(rng, layers, experts, ranks, per_rank)
