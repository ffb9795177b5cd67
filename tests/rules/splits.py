"""Worlds for `split_batch`, all that can be done in tiny ones, and what holds for every split."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st


def rank_loads(per_slot, num_ranks):
    return np.asarray(per_slot).reshape(num_ranks, -1).sum(axis=1)


def check_conserved(tokens, slots, per_slot):
    assert per_slot.dtype == np.int64
    assert (per_slot >= 0).all()
    assert np.bincount(slots, weights=per_slot, minlength=len(tokens)).tolist() == list(tokens)


def all_splits(tokens, slots):
    """Every way to share the tokens out, as tokens per slot."""
    ways = []
    for expert, count in enumerate(tokens):
        mine = np.flatnonzero(np.asarray(slots) == expert)
        shares = [s for s in itertools.product(range(count + 1), repeat=len(mine)) if sum(s) == count]
        ways.append([(mine, share) for share in shares])
    for choice in itertools.product(*ways):
        per_slot = np.zeros(len(slots), int)
        for mine, share in choice:
            per_slot[mine] = share
        yield per_slot


@st.composite
def cases(draw, most_ranks=6, most_width=4, most_tokens=50):
    num_ranks = draw(st.integers(1, most_ranks))
    num_slots = num_ranks * draw(st.integers(1, most_width))
    num_experts = draw(st.integers(1, num_slots))
    more = draw(st.lists(st.integers(0, num_experts - 1), min_size=num_slots, max_size=num_slots))
    slots = np.array((list(range(num_experts)) + more)[:num_slots])
    slots = slots[draw(st.permutations(range(num_slots)))]
    counts = st.one_of(st.just(0), st.integers(0, most_tokens))
    tokens = draw(st.lists(counts, min_size=num_experts, max_size=num_experts))
    return np.array(tokens), slots, num_ranks
