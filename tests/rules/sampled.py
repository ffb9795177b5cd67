"""Random layers and placements for the rules: tables with don't-care columns, and the routing of several ranks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

import evenmoe as em


@st.composite
def layers(draw):
    """A table with don't-care columns, its number of slots, and the routing and masks of several ranks."""
    num_experts = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 5), min_size=num_experts, max_size=num_experts))
    num_slots = sum(counts)
    free = draw(st.permutations(range(num_slots)))
    columns = 1 + max(counts) + draw(st.integers(0, 2))
    table = torch.full((num_experts, columns), -7, dtype=torch.int32)
    for expert, count in enumerate(counts):
        table[expert, 0] = count
        table[expert, 1 : 1 + count] = torch.tensor(free[:count])
        free = free[count:]
    world = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    routed, masks = [], []
    for _ in range(world):
        shape = (draw(st.sampled_from([0, 1, 2, 7, 33])), draw(st.integers(1, 4)))
        hot = draw(st.integers(1, num_experts))
        routed.append(torch.randint(0, hot, shape, generator=generator).to(dtype))
        masks.append(torch.rand(shape, generator=generator) < 0.6 if draw(st.booleans()) else None)
    return table, num_slots, routed, masks


def counts_of(routed, masks, num_experts):
    rows = [ids[mask] if mask is not None else ids for ids, mask in zip(routed, masks, strict=True)]
    return torch.stack([torch.bincount(row.reshape(-1), minlength=num_experts) for row in rows])


def same(result, expected):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.tolist() == expected.tolist()


def slots_of(table, num_slots):
    slots = np.empty(num_slots, np.int64)
    for expert, row in enumerate(table.tolist()):
        slots[row[1 : 1 + row[0]]] = expert
    return slots


def placement_with(count, num_ranks, seed=0):
    """Expert 0 in `count` slots on distinct ranks, its table row shuffled; every other slot has its own expert."""
    rng = np.random.default_rng(seed)
    width = -(-count // num_ranks) + 1
    slots = np.arange(num_ranks * width) + 1
    slots[np.arange(count) % num_ranks * width + np.arange(count) // num_ranks] = 0
    _, slots = np.unique(slots, return_inverse=True)
    index = np.zeros(len(slots), int)
    index[slots == 0] = rng.permutation(count)
    return em.Placement([slots], num_ranks, replica_index=[index])
