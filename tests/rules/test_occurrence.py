"""The rule "occurrence" against its plain loop, bit for bit, and against what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from evenmoe.errors import ConstraintError
from evenmoe.reference import update_expert as reference
from evenmoe.rules import occurrence
from tests.rules.evenness import EVENNESS, EVERY_TOKEN, check_every_token, check_some_tokens
from tests.rules.sampled import layers, same


@settings(max_examples=150, deadline=None)
@given(layers())
def test_it_is_the_reference(layer):
    table, _, routed, masks = layer
    for rank, (ids, mask) in enumerate(zip(routed, masks, strict=True)):
        expected = reference.occurrence(ids, table, rank, mask)
        same(occurrence.choose(ids, table, rank, mask), expected)
        same(occurrence._choose_anywhere(ids, table, rank, mask), expected)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_replicas_are_within_one_assignment_on_a_rank(layer):
    table, num_slots, routed, masks = layer
    for rank, (ids, mask) in enumerate(zip(routed, masks, strict=True)):
        chosen = occurrence.choose(ids, table, rank, mask)
        taken = torch.bincount((chosen if mask is None else chosen[mask]).reshape(-1), minlength=num_slots)
        for row in table.tolist():
            mine = taken[row[1 : 1 + row[0]]]
            assert mine.max() - mine.min() <= 1


def choose(ids, table, rank, quotas, counts):
    return occurrence.choose(ids, table, rank)


@pytest.mark.parametrize("case", EVENNESS)
def test_evenness_when_some_tokens_use_the_expert(case):
    check_some_tokens(choose, case, EVENNESS[case][0])


@pytest.mark.parametrize(("world", "tokens", "copies", "best_of_the_others"), EVERY_TOKEN)
def test_evenness_when_every_token_uses_the_expert(world, tokens, copies, best_of_the_others):
    check_every_token(choose, world, tokens, copies, best_of_the_others)


@pytest.mark.parametrize("mask", [torch.ones(2, dtype=torch.bool), torch.ones(2, 1)])
def test_a_mask_that_does_not_fit_is_named(mask):
    table = torch.tensor([[1, 0, 0], [2, 1, 2]], dtype=torch.int32)
    with pytest.raises(ConstraintError, match=r"`counted` is of dtype .* and shape .*: it must be bool and have"):
        occurrence.choose(torch.tensor([[0], [1]]), table, 0, mask)
