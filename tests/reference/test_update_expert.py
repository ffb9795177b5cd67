"""update_expert against the tables of the specification (§1.4, §1.9) and the rules of §1.3 and §1.5."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.reference.update_expert import update_expert

X = -7  # don't care: must never come out

# §1.9
TABLE = torch.tensor(
    [[1, 0, X, X, X, X], [2, 1, 7, X, X, X], [3, 2, 8, 13, X, X], [5, 3, 4, 5, 6, 9]], dtype=torch.int32
)
IDS = [[0, 1, 2], [3, 2, 1], [1, 3, 0], [2, 0, 3]]
BY_RANK = {
    0: [[0, 1, 2], [3, 2, 1], [1, 3, 0], [2, 0, 3]],
    3: [[0, 1, 8], [4, 8, 1], [1, 4, 0], [8, 0, 4]],
    4: [[0, 7, 8], [5, 8, 7], [7, 5, 0], [8, 0, 5]],
    7: [[0, 7, 13], [6, 13, 7], [7, 6, 0], [13, 0, 6]],
}
BY_TOKEN = [[0, 1, 2], [4, 8, 7], [1, 5, 0], [2, 0, 6]]
SCALES = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.7, 0.2, 0.1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rank", sorted(BY_RANK))
def test_by_rank_gives_the_specified_ids(rank, dtype):
    ids, mask = update_expert(torch.tensor(IDS, dtype=dtype), TABLE, local_rank_id=rank, world_size=8)
    assert ids.tolist() == BY_RANK[rank]
    assert ids.dtype == dtype
    assert mask.dtype == torch.bool
    assert mask.all()


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_by_token_gives_the_specified_ids_on_every_rank(rank):
    ids, mask = update_expert(torch.tensor(IDS), TABLE, balance_mode=1, local_rank_id=rank)
    assert ids.tolist() == BY_TOKEN
    assert mask.all()


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("mode", [0, 1])
def test_the_specified_mask(shape, mode):
    ids, mask = update_expert(
        torch.tensor(IDS),
        TABLE,
        local_rank_id=3,
        world_size=8,
        balance_mode=mode,
        expert_scales=torch.tensor(SCALES),
        pruning_threshold=torch.tensor([0.0, 0.25, 0.2]).reshape(shape),
        active_mask=torch.tensor([True, True, True, False]),
    )
    assert mask.tolist() == [[True] * 3, [True, True, False], [True] * 3, [False] * 3]
    assert ids.tolist() == (BY_RANK[3] if mode == 0 else BY_TOKEN)  # masks never touch the ids


@pytest.mark.parametrize(
    "given_arguments",
    [
        {},
        {"expert_scales": torch.tensor(SCALES)},
        {"pruning_threshold": torch.ones(3)},
        {"active_mask": torch.zeros(4, dtype=torch.bool)},
    ],
)
def test_without_both_pruning_inputs_nothing_is_masked(given_arguments):
    assert update_expert(torch.tensor(IDS), TABLE, balance_mode=1, **given_arguments)[1].all()


# §1.4: world, count, how many ranks each used replica serves, which are never used
USAGE = [
    (8, 3, [3, 3, 2], []),
    (8, 5, [2, 2, 2, 2], [5]),
    (8, 6, [2, 2, 2, 2], [5, 6]),
    (8, 7, [2, 2, 2, 2], [5, 6, 7]),
    (6, 4, [2, 2, 2], [4]),
    (16, 5, [4, 4, 4, 4], [5]),
    (16, 6, [3, 3, 3, 3, 3, 1], []),
    (16, 7, [3, 3, 3, 3, 3, 1], [7]),
    (16, 9, [2] * 8, [9]),
    (384, 250, [2] * 192, list(range(193, 251))),
]


@pytest.mark.parametrize(("world", "count", "ranks_each", "never"), USAGE)
def test_replica_usage_by_rank(world, count, ranks_each, never):
    table = torch.tensor([[count, *range(1, count + 1)]], dtype=torch.int32)
    chosen = [
        int(update_expert(torch.tensor([[0]]), table, local_rank_id=rank, world_size=world)[0]) for rank in range(world)
    ]
    assert chosen == sorted(chosen)
    assert [chosen.count(replica) for replica in range(1, len(ranks_each) + 1)] == ranks_each
    assert sorted(set(range(1, count + 1)) - set(chosen)) == never


@settings(deadline=None)  # a shared machine may stall any single example
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_by_rank_depends_only_on_the_block_of_ranks(world, count, data):
    """§1.3, §11.5: ranks of one block of ⌈world/count⌉ agree, and neighbouring blocks do not."""
    rank = data.draw(st.integers(0, world - 1))
    block = -(-world // count)
    table = torch.tensor([[count, *range(100, 100 + count)]], dtype=torch.int32)

    def replica(of_rank: int) -> int:
        return int(update_expert(torch.tensor([[0]]), table, local_rank_id=of_rank, world_size=world)[0])

    assert replica(rank) == 100 + rank // block
    assert replica(rank) == replica(rank - rank % block)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 20))
def test_by_token_walks_the_replicas_row_by_row(count, num_tokens):
    table = torch.tensor([[count, *range(count)]], dtype=torch.int32)
    ids, _ = update_expert(torch.zeros((num_tokens, 2), dtype=torch.int64), table, balance_mode=1)
    assert ids.tolist() == [[row % count] * 2 for row in range(num_tokens)]


def test_a_weight_exactly_at_the_threshold_stays():
    scales, threshold = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0.0, 0.25, 0.2500001])
    mask = update_expert(
        torch.tensor([[0, 0, 0]]), TABLE, balance_mode=1, expert_scales=scales, pruning_threshold=threshold
    )[1]
    assert mask.tolist() == [[True, True, False]]


def test_the_sum_runs_in_fp32_by_ascending_k():
    """2²⁴ + 1 + 1 is 2²⁴ one by one and 2²⁴+2 any other way; the threshold 1 on k = 0 tells them apart."""
    scales, threshold = torch.tensor([[2.0**24, 1.0, 1.0]]), torch.tensor([1.0, 0.0, 0.0])
    arguments = {"balance_mode": 1, "pruning_threshold": threshold}
    ids = torch.tensor([[0, 0, 0]])
    assert update_expert(ids, TABLE, expert_scales=scales, **arguments)[1][0, 0]
    scales = torch.tensor([[2.0**24, 2.0, 0.0]])
    assert not update_expert(ids, TABLE, expert_scales=scales, **arguments)[1][0, 0]


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_narrow_scales_are_widened_before_they_are_added(dtype, tiny):
    """1 + tiny is 1 in the narrow type (a tie, to even) but more in fp32, where 1 no longer reaches the whole sum."""
    scales, threshold = torch.tensor([[1.0, tiny]], dtype=dtype), torch.tensor([1.0, 0.0])
    mask = update_expert(
        torch.tensor([[0, 1]]), TABLE, balance_mode=1, expert_scales=scales, pruning_threshold=threshold
    )[1]
    assert mask.tolist() == [[False, True]]


def test_no_tokens():
    ids, mask = update_expert(torch.zeros((0, 3), dtype=torch.int32), TABLE, balance_mode=1)
    assert ids.shape == mask.shape == (0, 3)
