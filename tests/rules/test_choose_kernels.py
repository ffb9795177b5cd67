"""The counting rules: compiled and vectorised against the reference, bit for bit, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.reference import update_expert as reference
from evenmoe.rules import batch, occurrence


@st.composite
def layers(draw):
    """A table with don't-care entries, its number of slots, and the picks and masks of several ranks."""
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
    picks, masks = [], []
    for _ in range(world):
        shape = (draw(st.sampled_from([0, 1, 2, 7, 33])), draw(st.integers(1, 4)))
        hot = draw(st.integers(1, num_experts))
        picks.append(torch.randint(0, hot, shape, generator=generator).to(dtype))
        masks.append(torch.rand(shape, generator=generator) < 0.6 if draw(st.booleans()) else None)
    return table, num_slots, picks, masks


def counts_of(picks, masks, num_experts):
    rows = [ids[mask] if mask is not None else ids for ids, mask in zip(picks, masks, strict=True)]
    return torch.stack([torch.bincount(row.reshape(-1), minlength=num_experts) for row in rows])


def same(result, expected):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.tolist() == expected.tolist()


@settings(max_examples=150, deadline=None)
@given(layers())
def test_occurrence_is_the_reference(layer):
    table, _, picks, masks = layer
    for rank, (ids, mask) in enumerate(zip(picks, masks, strict=True)):
        expected = reference.occurrence(ids, table, rank, mask)
        same(occurrence.choose(ids, table, rank, mask), expected)
        same(occurrence._choose_anywhere(ids, table, rank, mask), expected)


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(0, 10**6))
def test_batch_is_the_reference_whatever_the_quotas(layer, seed):
    table, num_slots, picks, masks = layer
    counts = counts_of(picks, masks, len(table))
    rng = np.random.default_rng(seed)
    split = em.split_batch(counts.sum(0), slots_of(table, num_slots), 1)
    for quotas in (split, rng.integers(0, 9, num_slots), np.zeros(num_slots, np.int64)):
        for rank, (ids, mask) in enumerate(zip(picks, masks, strict=True)):
            expected = reference.batch(ids, table, quotas.tolist(), counts.tolist(), rank, mask)
            same(batch.choose(ids, table, quotas, counts, rank, mask), expected)
            same(batch._choose_anywhere(ids, table, quotas, counts, rank, mask), expected)
            for expert, slot in zip(ids.reshape(-1).tolist(), expected.reshape(-1).tolist(), strict=True):
                assert slot in table[expert, 1 : 1 + int(table[expert, 0])].tolist()  # never another expert's weights


def slots_of(table, num_slots):
    slots = np.empty(num_slots, np.int64)
    for expert, row in enumerate(table.tolist()):
        slots[row[1 : 1 + row[0]]] = expert
    return slots


@settings(max_examples=60, deadline=None)
@given(layers())
def test_batch_meets_every_quota(layer):
    table, num_slots, picks, masks = layer
    counts = counts_of(picks, masks, len(table))
    quotas = em.split_batch(counts.sum(0), slots_of(table, num_slots), 1)
    taken = np.zeros(num_slots, np.int64)
    for rank, (ids, mask) in enumerate(zip(picks, masks, strict=True)):
        chosen = batch.choose(ids, table, quotas, counts, rank, mask)
        chosen = chosen if mask is None else chosen[mask]
        np.add.at(taken, chosen.numpy().reshape(-1), 1)
    assert taken.tolist() == quotas.tolist()


@settings(max_examples=60, deadline=None)
@given(layers())
def test_occurrence_leaves_replicas_within_one_pick_on_a_rank(layer):
    table, num_slots, picks, masks = layer
    for rank, (ids, mask) in enumerate(zip(picks, masks, strict=True)):
        chosen = occurrence.choose(ids, table, rank, mask)
        taken = torch.bincount((chosen if mask is None else chosen[mask]).reshape(-1), minlength=num_slots)
        for row in table.tolist():
            mine = taken[row[1 : 1 + row[0]]]
            assert mine.max() - mine.min() <= 1


def test_views_are_read_as_they_are():
    table = torch.tensor([[2, 0, 1], [1, 2, -7]], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]])
    wide = torch.cat([table, table], dim=1)[:, :3]
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for view in (ids.T, ids[:, ::2], ids[::2].T):
        same(occurrence.choose(view, wide, 1), reference.occurrence(view, table, 1))
        counts = torch.bincount(view.reshape(-1), minlength=2)[None]
        expected = reference.batch(view, table, [3, 2, 9], counts.tolist(), 0)
        same(batch.choose(view, wide, torch.tensor([3, 2, 9]), counts, 0), expected)
    columns = torch.cat([mask, mask], dim=1)[:, :2]
    same(occurrence.choose(ids[:, ::2], table, 0, columns), reference.occurrence(ids[:, ::2], table, 0, mask))


def busiest_over_mean(choose, world, tokens, copies, share, trials, seed=0):
    """Busiest replica over the mean of one expert that each token picks with probability `share`, mean over trials."""
    rng = np.random.default_rng(seed)
    # Expert 1 takes the picks that are not counted; expert 0 has the slots 0 … copies − 1.
    table = torch.tensor([[copies, *range(copies)], [1, copies] + [0] * (copies - 1)], dtype=torch.int32)
    slots = np.array([0] * copies + [1])
    ratios = []
    for _ in range(trials):
        ids = torch.from_numpy((rng.random((world, tokens, 1)) >= share).astype(np.int64))
        counts = torch.stack([torch.bincount(own.reshape(-1), minlength=2) for own in ids])
        if counts[:, 0].sum() == 0:
            continue
        # One slot per rank, so that the best split of expert 0 is even over its replicas.
        quotas = em.split_batch(torch.tensor([int(counts[:, 0].sum()), 0]), slots, copies + 1)
        quotas[copies] = int(counts[:, 1].sum())
        taken = np.zeros(copies + 1)
        for rank in range(world):
            np.add.at(taken, choose(ids[rank], table, rank, quotas, counts).numpy().reshape(-1), 1)
        ratios.append(taken[:copies].max() / taken[:copies].mean())
    return np.mean(ratios), np.std(ratios) / np.sqrt(len(ratios))


def by_occurrence(ids, table, rank, quotas, counts):
    return occurrence.choose(ids, table, rank)


def by_batch(ids, table, rank, quotas, counts):
    return batch.choose(ids, table, quotas, counts, rank)


# Ranks, tokens a rank, replicas, share of the tokens that pick the expert -> occurrence with the rank term, lower bound
# (400 trials of the table "replica rules compared").
EVENNESS = {
    (8, 1, 2, 0.5): (1.32, 1.13),
    (8, 4, 4, 0.5): (1.22, 1.10),
    (8, 32, 4, 0.25): (1.05, 1.02),
    (8, 128, 6, 0.25): (1.03, 1.01),
    (32, 1, 4, 0.5): (1.38, 1.10),
    (32, 32, 4, 0.25): (1.03, 1.01),
    (32, 128, 8, 0.25): (1.02, 1.00),
    (64, 128, 8, 0.5): (1.01, 1.00),
}


@pytest.mark.parametrize("case", EVENNESS)
@pytest.mark.parametrize("choose", [by_occurrence, by_batch])
def test_evenness_when_some_tokens_pick_the_expert(case, choose):
    mean, error = busiest_over_mean(choose, *case, trials=200 if case[0] < 64 else 20)
    expected = EVENNESS[case][0 if choose is by_occurrence else 1]
    # Both numbers are means of random trials, the table's of 400 and rounded to 0.01: three standard errors of each.
    assert mean <= expected + 0.005 + 3 * error * (1 + np.sqrt(200 / 400))


@pytest.mark.parametrize(
    ("world", "tokens", "copies", "best_of_the_others"),
    [
        (8, 1, 5, 1.25),
        (8, 1, 6, 1.50),
        (8, 1, 8, 1.00),
        (8, 4, 6, 1.12),
        (8, 4, 8, 1.00),
        (8, 128, 6, 1.01),
        (32, 4, 6, 1.03),
        (32, 128, 8, 1.00),
    ],
)
@pytest.mark.parametrize("choose", [by_occurrence, by_batch])
def test_evenness_when_every_token_picks_the_expert(world, tokens, copies, best_of_the_others, choose):
    mean, error = busiest_over_mean(choose, world, tokens, copies, share=1.0, trials=1)
    assert error == 0
    picks = world * tokens
    if choose is by_batch:
        assert mean == pytest.approx(-(-picks // copies) / (picks / copies))
    assert mean <= best_of_the_others + 0.0051  # the table rounds to 0.01


TABLE = torch.tensor([[1, 0, 0], [2, 1, 2]], dtype=torch.int32)
QUOTAS, COUNTS = np.array([1, 1, 1]), torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("expert", "table", "text"),
    [
        (2, TABLE, "`expert_ids` is 2 at assignment 1: it must be a row of eplb_table, 0 to 1"),
        (-1, TABLE, "`expert_ids` is -1 at assignment 1"),
        (
            1,
            torch.tensor([[1, 0, 0], [0, 1, 2]], dtype=torch.int32),
            "`eplb_table` is [0, 1, 2] in row 1: it must count",
        ),
        (
            1,
            torch.tensor([[1, 0, 0], [3, 1, 2]], dtype=torch.int32),
            "`eplb_table` is [3, 1, 2] in row 1: it must count",
        ),
    ],
)
def test_wrong_picks_and_tables_are_named(expert, table, text):
    ids = torch.tensor([[0], [expert]])
    with pytest.raises(ConstraintError) as caught:
        occurrence.choose(ids, table, 0)
    assert text in str(caught.value)
    with pytest.raises(ConstraintError) as caught:
        batch.choose(ids, table, QUOTAS, COUNTS, 0)
    assert text in str(caught.value)


@pytest.mark.parametrize("slot", [3, -1])
def test_a_slot_without_quota_is_named(slot):
    table = torch.tensor([[1, 0, 0], [2, 1, slot]], dtype=torch.int32)
    with pytest.raises(ConstraintError, match="must count 1 to 2 replicas, then name their slots"):
        batch.choose(torch.tensor([[1]]), table, QUOTAS, COUNTS, 0)


def test_shapes_that_do_not_fit_are_named():
    ids = torch.tensor([[0], [1]])
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(2, 1)):
        with pytest.raises(ConstraintError, match=r"`counted` is of dtype .* and shape .*: it must be bool and have"):
            occurrence.choose(ids, TABLE, 0, mask)
    with pytest.raises(ConstraintError, match=r"`counts_by_rank` is an array of shape \(1, 3\)"):
        batch.choose(ids, TABLE, QUOTAS, torch.ones(1, 3), 0)
    with pytest.raises(ConstraintError, match="`rank` is 1: it must be a row of counts_by_rank, 0 to 0"):
        batch.choose(ids, TABLE, QUOTAS, COUNTS, 1)
