"""The result of a layer depends on its tokens, weights and experts alone: not on ranks, slots, replicas or the rule.

And it is the exact sum rounded once, for all but the values whose exact sum lies so near the middle between two
bfloat16 numbers that the float32 sum falls on the other side.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.placement import Placement
from evenmoe.transport.world import Rank
from tests.placements import random_placement
from tests.runtime.layers import RULES

TOKENS, HIDDEN, EXPERTS, TOP_K = 24, 40, 8, 5


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 (T, H) tokens, (T, K) ids with one hot expert, float32 (T, K) weights, (E, H) factors of the experts."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn((TOKENS, HIDDEN), generator=random).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(TOKENS)])
    ids = torch.where((ids == 0).any(1, keepdim=True), ids, torch.cat([torch.zeros_like(ids[:, :1]), ids[:, 1:]], 1))
    weights = torch.rand((TOKENS, TOP_K), generator=random)
    return x, ids, weights, torch.randn((EXPERTS, HIDDEN), generator=random)


def run(ranks: int, per_rank: int, rule: str) -> torch.Tensor:
    x, ids, weights, factors = inputs()
    placement: Placement = random_placement(np.random.default_rng(ranks + per_rank), 1, EXPERTS, ranks, per_rank)
    mine = torch.arange(TOKENS).tensor_split(ranks)  # ranks have different numbers of tokens

    def step(rank: Rank) -> torch.Tensor:
        layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=ranks * per_rank, rule=rule)
        tokens = mine[rank.index]
        rows = layer.dispatch(x[tokens], ids[tokens], weights[tokens])
        slots = torch.arange(per_rank).repeat_interleave(rows.num_tokens_per_expert) + rank.index * per_rank
        experts = torch.tensor(placement.slot_to_expert[0].tolist())[slots]
        return layer.combine(rows, (rows.rows.float() * factors[experts]).bfloat16())

    with em.local_world(ranks, timeout_s=60.0) as world:
        return torch.cat(world.run(step))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("ranks", "per_rank"), [(1, 8), (2, 4), (2, 7), (3, 5), (4, 2), (4, 3), (8, 1), (8, 2)])
def test_bits_do_not_depend_on_ranks_slots_or_rule(ranks, per_rank, rule):
    assert torch.equal(run(ranks, per_rank, rule).view(torch.int16), run(1, EXPERTS, "rank").view(torch.int16))


def test_results_are_the_exact_sum_rounded_once():
    x, ids, weights, factors = inputs()
    y = run(4, 3, "occurrence")
    # Of five float32 products and four sums each is off by half a unit of its last place at most, 2^-24 of what it
    # is: together 2^-24 · 9 · Σ|terms|, to first order; 10 covers the higher orders.
    for token in range(TOKENS):
        rows = (x[token].float() * factors[ids[token]]).bfloat16().double()
        for column in range(HIDDEN):
            terms = [
                Fraction(weight) * Fraction(row)
                for weight, row in zip(weights[token].tolist(), rows[:, column].tolist(), strict=True)
            ]
            exact, slack = sum(terms), Fraction(10, 2**24) * sum(map(abs, terms))
            allowed = {torch.tensor(float(end)).bfloat16().item() for end in (exact - slack, exact, exact + slack)}
            assert y[token, column].item() in allowed
