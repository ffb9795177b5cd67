"""The rule "batch" against its plain loop, bit for bit, and against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.reference import update_expert as reference
from evenmoe.rules import batch
from tests.rules.evenness import EVENNESS, EVERY_TOKEN, check_every_token, check_some_tokens
from tests.rules.sampled import counts_of, layers, same, slots_of


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(0, 10**6))
def test_it_is_the_reference_whatever_the_quotas(layer, seed):
    table, num_slots, routed, masks = layer
    counts = counts_of(routed, masks, len(table))
    rng = np.random.default_rng(seed)
    split = em.split_batch(counts.sum(0), slots_of(table, num_slots), 1)
    for quotas in (split, rng.integers(0, 9, num_slots), np.zeros(num_slots, np.int64)):
        for rank, (ids, mask) in enumerate(zip(routed, masks, strict=True)):
            expected = reference.batch(ids, table, quotas.tolist(), counts.tolist(), rank, mask)
            same(batch.choose(ids, table, quotas, counts, rank, mask), expected)
            same(batch._choose_anywhere(ids, table, quotas, counts, rank, mask), expected)
            for expert, slot in zip(ids.reshape(-1).tolist(), expected.reshape(-1).tolist(), strict=True):
                assert slot in table[expert, 1 : 1 + int(table[expert, 0])].tolist()  # never another expert's weights


@settings(max_examples=60, deadline=None)
@given(layers())
def test_every_quota_is_met(layer):
    table, num_slots, routed, masks = layer
    counts = counts_of(routed, masks, len(table))
    quotas = em.split_batch(counts.sum(0), slots_of(table, num_slots), 1)
    taken = np.zeros(num_slots, np.int64)
    for rank, (ids, mask) in enumerate(zip(routed, masks, strict=True)):
        chosen = batch.choose(ids, table, quotas, counts, rank, mask)
        chosen = chosen if mask is None else chosen[mask]
        np.add.at(taken, chosen.numpy().reshape(-1), 1)
    assert taken.tolist() == quotas.tolist()


def choose(ids, table, rank, quotas, counts):
    return batch.choose(ids, table, quotas, counts, rank)


@pytest.mark.parametrize("case", EVENNESS)
def test_evenness_when_some_tokens_use_the_expert(case):
    check_some_tokens(choose, case, EVENNESS[case][1])


@pytest.mark.parametrize(("world", "tokens", "copies", "best_of_the_others"), EVERY_TOKEN)
def test_evenness_when_every_token_uses_the_expert(world, tokens, copies, best_of_the_others):
    mean = check_every_token(choose, world, tokens, copies, best_of_the_others)
    assignments = world * tokens
    assert mean == pytest.approx(-(-assignments // copies) / (assignments / copies))


TABLE = torch.tensor([[1, 0, 0], [2, 1, 2]], dtype=torch.int32)
QUOTAS, COUNTS = np.array([1, 1, 1]), torch.tensor([[1, 2]])


@pytest.mark.parametrize("slot", [3, -1])
def test_a_slot_without_quota_is_named(slot):
    table = torch.tensor([[1, 0, 0], [2, 1, slot]], dtype=torch.int32)
    with pytest.raises(ConstraintError, match="must count 1 to 2 replicas, then name their slots"):
        batch.choose(torch.tensor([[1]]), table, QUOTAS, COUNTS, 0)


def test_counts_and_ranks_that_do_not_fit_are_named():
    ids = torch.tensor([[0], [1]])
    with pytest.raises(ConstraintError, match=r"`counts_by_rank` is an array of shape \(1, 3\)"):
        batch.choose(ids, TABLE, QUOTAS, torch.ones(1, 3), 0)
    with pytest.raises(ConstraintError, match="`rank` is 1: it must be a row of counts_by_rank, 0 to 0"):
        batch.choose(ids, TABLE, QUOTAS, COUNTS, 1)
