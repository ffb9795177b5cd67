"""`ExpertParallel` under the batch rule with weights: slots as the split says, results as under any rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import RankDisagreementError
from evenmoe.rules.batch import BatchRule
from tests.worlds import assert_same_bits

RANKS, EXPERTS, SLOTS, TOP_K = 4, 8, 16, 2


def step(rank, placement, ids, rule):
    """Rows on each slot of this rank, and what combine gives where expert e multiplies by e + 1."""
    layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=SLOTS, rule=rule)
    mine = ids[rank.index]
    x = torch.arange(len(mine), dtype=torch.float32)[:, None] + rank.index
    dispatched = layer.dispatch(x, mine, torch.ones(mine.shape))
    held = torch.from_numpy(placement.slot_to_expert[0].reshape(RANKS, -1)[rank.index].astype(np.int64))
    factors = held.repeat_interleave(dispatched.num_tokens_per_expert) + 1
    return dispatched.num_tokens_per_expert, layer.combine(dispatched, dispatched.rows * factors[:, None])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=RANKS, max_size=RANKS), st.integers(0, 1000), st.sampled_from([1, 35, 150]))
def test_what_ranks_compute_is_the_split(tokens, seed, weight_rows):
    random = np.random.default_rng(seed)
    ids = [
        torch.from_numpy(random.integers(-1, EXPERTS, (number, TOP_K)))
        if seed % 3
        else torch.zeros(number, TOP_K).long()
        for number in tokens
    ]
    placement = em.plan(random.random((1, EXPERTS)) + 0.1, num_ranks=RANKS, num_slots=SLOTS)
    with em.local_world(RANKS, timeout_s=60.0) as world:
        found = world.run(lambda rank: step(rank, placement, ids, BatchRule(weight_rows=weight_rows)))
        expected = world.run(lambda rank: step(rank, placement, ids, "rank"))
    counts = np.bincount(torch.cat(ids).flatten().numpy() + 1, minlength=EXPERTS + 1)[1:]
    split = em.split_batch(counts, placement.slot_to_expert[0], RANKS, weight_rows=weight_rows)
    assert torch.cat([taken for taken, _ in found]).tolist() == split.tolist()
    for rank in range(RANKS):
        assert_same_bits(found[rank][1], expected[rank][1], f"rank {rank}")


def test_ranks_that_weigh_differently_are_told_so():
    placement = em.plan(np.ones((1, EXPERTS)), num_ranks=RANKS, num_slots=SLOTS)
    ids = [torch.zeros((2, TOP_K), dtype=torch.long)] * RANKS

    def run(rank):
        with pytest.raises(
            RankDisagreementError, match=r"`digest of the code and the settings of rule` is .* on rank 1"
        ):
            step(rank, placement, ids, BatchRule(weight_rows=35 if rank.index == 1 else 150))

    with em.local_world(RANKS, timeout_s=60.0) as world:
        world.run(run)
    assert BatchRule().identity() != BatchRule(1).identity() != BatchRule(2).identity()
