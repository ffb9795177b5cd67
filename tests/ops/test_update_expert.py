"""update_expert: the reference's values in every mode, prepared or not, whatever the layout in memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.ops.update_expert import prepare
from evenmoe.reference.update_expert import occurrence as reference_occurrence
from evenmoe.reference.update_expert import update_expert as reference
from tests.worlds import DTYPES, assert_same_bits, strided

MODES = {0: 0, "rank": 0, 1: 1, "token": 1, "occurrence": 2}


@dataclass
class Call:
    """Arguments of one call; `pruning` is None or (expert_scales, pruning_threshold, active_mask or None)."""

    ids: torch.Tensor
    table: torch.Tensor
    rank: int
    world_size: int
    mode: int | str
    pruning: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Tables of slots (unique over the table) or, as the older page has them, of rank numbers that repeat."""
    seed = draw(st.integers(0, 2**16))
    random = torch.Generator().manual_seed(seed)
    experts, world_size = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    columns = 1 + draw(st.integers(1, world_size))
    table = torch.randint(-(2**31), 2**31 - 1, (experts, columns), generator=random, dtype=torch.int32)
    slots = torch.randperm(experts * columns, generator=random).int().view(experts, columns)
    if draw(st.booleans()):
        slots %= world_size
    for expert in range(experts):
        table[expert, 0] = count = draw(st.integers(1, columns - 1))
        table[expert, 1 : 1 + count] = slots[expert, :count]
    num_tokens, top_k = draw(st.sampled_from([0, 1, 2, 7, 30])), draw(st.integers(1, min(experts, 5)))
    ids = torch.rand((num_tokens, experts), generator=random).argsort(dim=1)[:, :top_k]
    if draw(st.booleans()):
        ids[:, 0] = 0  # every token wants one expert
    pruning = None
    if draw(st.booleans()):
        # Quarters: thresholds are met exactly now and then, in every dtype.
        scales = torch.randint(5, (num_tokens, top_k), generator=random) / 4
        threshold = torch.randint(4, (top_k,), generator=random) / 4
        active = torch.rand(num_tokens, generator=random) < 0.7
        pruning = (
            scales.to(DTYPES[draw(st.sampled_from(list(DTYPES)))]),
            threshold[None] if draw(st.booleans()) else threshold,
            active if draw(st.booleans()) else None,
        )
    return Call(
        ids=ids.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        table=table,
        rank=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        mode=draw(st.sampled_from(list(MODES))),
        pruning=pruning,
    )


def expected(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    scales, threshold, active = call.pruning or (None, None, None)
    mode = MODES[call.mode]
    ids, mask = reference(
        call.ids,
        call.table,
        local_rank_id=call.rank,
        world_size=call.world_size,
        balance_mode=min(mode, 1),
        expert_scales=scales,
        pruning_threshold=threshold,
        active_mask=active,
    )
    return (reference_occurrence(call.ids, call.table, call.rank) if mode == 2 else ids), mask


@settings(max_examples=300, deadline=None)
@given(call=calls(), awkward=st.booleans(), check_values=st.booleans())
def test_equals_the_reference(call, awkward, check_values):
    place = strided if awkward else (lambda tensor: tensor)
    pruning = [None if tensor is None else place(tensor) for tensor in call.pruning or (None, None, None)]
    ids, mask = em.update_expert(
        place(call.ids), place(call.table), call.rank, call.world_size, call.mode, *pruning, check_values=check_values
    )
    want_ids, want_mask = expected(call)
    assert_same_bits(ids, want_ids, "ids")
    assert_same_bits(mask, want_mask, "mask")


@settings(max_examples=150, deadline=None)
@given(call=calls(), awkward=st.booleans(), check_values=st.booleans())
def test_prepared_equals_the_reference(call, awkward, check_values):
    place = strided if awkward else (lambda tensor: tensor)
    prepared = prepare(place(call.table), call.rank, call.world_size, call.mode, check_values=check_values)
    for _ in range(2):
        assert_same_bits(prepared(place(call.ids)), expected(call)[0], "ids")


TABLE = torch.tensor([[2, 0, 1, -5], [3, 2, 3, 4], [1, 5, -5, -5]], dtype=torch.int32)


@pytest.mark.parametrize("mode", ["rank", "token", "occurrence"])
def test_one_prepared_rule_serves_batches_of_any_size_and_both_dtypes(mode):
    """The token rule's lookup grows with the batch up to the least common multiple of the counts, 6, and then wraps."""
    prepared = prepare(TABLE, local_rank_id=1, world_size=2, balance_mode=mode)
    for num_tokens in (1, 5, 0, 3, 17, 17, 2, 6, 40):
        for dtype in (torch.int32, torch.int64, torch.int32):
            ids = torch.stack([torch.arange(num_tokens) % 3, (torch.arange(num_tokens) + 1) % 3], dim=1).to(dtype)
            call = Call(ids, TABLE, 1, 2, mode, None)
            assert_same_bits(prepared(ids), expected(call)[0], f"{num_tokens} tokens of {dtype}")


@pytest.mark.parametrize("mode", ["rank", "token", "occurrence"])
def test_prepared_keeps_its_own_table(mode):
    """A plan that is replaced in place must not change what a prepared rule gives, not even for a larger batch."""
    table, ids = TABLE.clone(), torch.tensor([[0, 1, 2]] * 7)
    prepared = prepare(table, local_rank_id=1, world_size=2, balance_mode=mode)
    prepared(ids[:2])
    table[:, 1:] = 9
    assert_same_bits(prepared(ids), expected(Call(ids, TABLE, 1, 2, mode, None))[0], "ids")


def test_the_threshold_is_met_by_equality_in_float32():
    """§1.5: 0.25 ≥ 0.25 · 1 is kept; bf16 scales are widened first, so their sum is not rounded to bf16 (§1.5).

    bf16(1/3) = 0.333984375; three of them sum to 1.001953125 in float32, and to 1 in bf16.
    """
    scales = torch.tensor([[0.5, 0.25, 0.25]])
    _, mask = em.update_expert(
        torch.tensor([[0, 1, 2]]), TABLE, 0, 2, 0, scales, torch.tensor([0.5, 0.25, 0.2500001]), limits=None
    )
    assert mask.tolist() == [[True, True, False]]
    third = torch.full((1, 3), 1 / 3, dtype=torch.bfloat16)
    share = torch.tensor([0.3333, 0.33339, 0.3330])  # times 1.001953125: 0.33395, 0.33404, 0.33365
    _, mask = em.update_expert(torch.tensor([[0, 1, 2]]), TABLE, 0, 2, 0, third, share, limits=None)
    assert mask.tolist() == [[True, False, True]]


def test_the_sum_of_scales_runs_in_ascending_k():
    """1 + 2⁻²⁴ + 2⁻²⁴ is 1 from the left and 1 + 2⁻²³ from the right; the threshold tells which."""
    scales = torch.tensor([[1.0, 2.0**-24, 2.0**-24]])
    ids = torch.tensor([[0, 1, 2]])
    _, mask = em.update_expert(ids, TABLE, 0, 2, 0, scales, torch.tensor([1.0, 0.0, 0.0]), limits=None)
    assert mask.tolist() == [[True, True, True]]
    _, mask = em.update_expert(ids, TABLE, 0, 2, 0, scales.flip(1), torch.tensor([0.0, 0.0, 1.0]), limits=None)
    assert mask.tolist() == [[True, True, False]]


# §1.9
X = -7
EXAMPLE_TABLE = torch.tensor(
    [[1, 0, X, X, X, X], [2, 1, 7, X, X, X], [3, 2, 8, 13, X, X], [5, 3, 4, 5, 6, 9]], dtype=torch.int32
)
EXAMPLE_IDS = [[0, 1, 2], [3, 2, 1], [1, 3, 0], [2, 0, 3]]
BY_RANK = {
    0: [[0, 1, 2], [3, 2, 1], [1, 3, 0], [2, 0, 3]],
    3: [[0, 1, 8], [4, 8, 1], [1, 4, 0], [8, 0, 4]],
    4: [[0, 7, 8], [5, 8, 7], [7, 5, 0], [8, 0, 5]],
    7: [[0, 7, 13], [6, 13, 7], [7, 6, 0], [13, 0, 6]],
}
BY_TOKEN = [[0, 1, 2], [4, 8, 7], [1, 5, 0], [2, 0, 6]]
PRUNING = (
    torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.7, 0.2, 0.1]]),
    torch.tensor([0.0, 0.25, 0.2]),
    torch.tensor([True, True, True, False]),
)
PRUNED = [[True, True, True], [True, True, False], [True, True, True], [False, False, False]]


@pytest.mark.parametrize("limits", ["atlas-a3", "relaxed", "unlimited", None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_worked_example(dtype, limits):
    ids = torch.tensor(EXAMPLE_IDS, dtype=dtype)
    for rank, want in BY_RANK.items():
        got, mask = em.update_expert(ids, EXAMPLE_TABLE, rank, 8, limits=limits)
        assert (got.tolist(), got.dtype, mask.dtype, bool(mask.all())) == (want, dtype, torch.bool, True)
        got, mask = em.update_expert(ids, EXAMPLE_TABLE, rank, 8, 0, *PRUNING, limits=limits)
        assert (got.tolist(), mask.tolist()) == (want, PRUNED)
    got, mask = em.update_expert(ids, EXAMPLE_TABLE, balance_mode="token", limits=limits)
    assert (got.tolist(), bool(mask.all())) == (BY_TOKEN, True)


@pytest.mark.parametrize(
    ("world_size", "count", "never_used"),
    [
        (8, 3, []),
        (8, 5, [5]),
        (8, 6, [5, 6]),
        (8, 7, [5, 6, 7]),
        (6, 4, [4]),
        (16, 7, [7]),
        (16, 9, [9]),
        (384, 250, [*range(193, 251)]),
    ],
)
def test_the_replicas_that_no_rank_reaches(world_size, count, never_used):
    """§1.4."""
    table = torch.tensor([[count, *range(1, count + 1)]], dtype=torch.int32)
    used = [int(em.update_expert(torch.tensor([[0]]), table, rank, world_size)[0]) for rank in range(world_size)]
    assert used == sorted(used)
    assert sorted(set(range(1, count + 1)) - set(used)) == never_used


def test_more_replicas_than_ranks_uses_the_first_ones():
    """§1.3: cdiv is 1 then, so rank r takes replica r + 1; the documents forbid it, so only without limits."""
    table = torch.tensor([[5, 10, 11, 12, 13, 14]], dtype=torch.int32)
    used = [int(em.update_expert(torch.tensor([[0]]), table, rank, 3, limits=None)[0]) for rank in range(3)]
    assert used == [10, 11, 12]
