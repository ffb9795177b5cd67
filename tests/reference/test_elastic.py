"""Elastic worlds by hand (§2.11): ranks die, the active ranks are remapped, buffers keep their size."""

from __future__ import annotations

import pytest
import torch

from evenmoe.reference.combine import combine, combine_add_rms_norm
from evenmoe.reference.dispatch import dispatch

# ep 4, rank 0 shared, 6 experts; old rank 2 dies: 3 ranks, 4 experts, old ranks 0, 1, 3 become 0, 1, 2
WORLD = {"num_experts": 6, "shared_expert_num": 1, "shared_expert_rank_num": 1}
ONE_GONE = torch.tensor([1, 3, 1, 4, 0, 1, -1, 2, 0, 1, 3, -1], dtype=torch.int32)
IDS = [
    torch.tensor([[0, 2], [3, 1]]),
    torch.tensor([[1, 2], [0, 3]]),
    None,
    torch.tensor([[2, 0], [3, 1]]),
]


def labelled(rank: int, num_tokens: int = 2) -> torch.Tensor:
    return torch.tensor([[10.0 * rank + token] * 2 for token in range(num_tokens)], dtype=torch.bfloat16)


X = [labelled(0), labelled(1), None, labelled(3)]


@pytest.mark.parametrize("as_list", [False, True])
def test_scaled_down_dispatch_by_hand(as_list):
    vector = [ONE_GONE, ONE_GONE, None, ONE_GONE] if as_list else ONE_GONE
    zero, one, two, three = dispatch(X, IDS, elastic_info=vector, **WORLD)
    assert two is None
    assert zero.expand_x[:7, 0].tolist() == [0, 1, 10, 11, 30, 31, 0]
    assert zero.assist_info_for_combine[:18].tolist() == [0, 0, 2, 0, 1, 2, 1, 0, 2, 1, 1, 2, 2, 0, 2, 2, 1, 2]
    assert zero.ep_recv_counts.tolist() == [2, 4, 6, 0]
    assert zero.expert_token_nums.tolist() == [6]
    assert one.expand_x[:6, 0].tolist() == [0, 11, 30, 1, 10, 31]
    assert one.assist_info_for_combine[:18].tolist() == [0, 0, 0, 1, 1, 0, 2, 0, 1, 0, 1, 1, 1, 0, 0, 2, 1, 1]
    assert one.ep_recv_counts.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert one.expert_token_nums.tolist() == [3, 3]
    assert three.expand_x[:6, 0].tolist() == [0, 10, 30, 1, 11, 31]
    assert three.assist_info_for_combine[:18].tolist() == [0, 0, 1, 1, 0, 1, 2, 0, 0, 0, 1, 0, 1, 1, 1, 2, 1, 0]
    # A from the original values, the larger kind: max(8·min(2,2), 2·⌈4/1⌉) = 16 on every rank
    assert [len(result.expand_x) for result in (zero, one, three)] == [16, 16, 16]
    assert [len(result.assist_info_for_combine) for result in (zero, one, three)] == [128 * 16] * 3


def test_scaled_down_combine_returns_to_the_old_ranks():
    """Experts give back what they get: 0.5x + 0.25x + x (shared) = 1.75x, exact for these labels in bf16."""
    dispatched = dispatch(X, IDS, elastic_info=ONE_GONE, **WORLD)
    outputs = [None if d is None else d.expand_x for d in dispatched]
    weights = [None if ids is None else torch.tensor([[0.5, 0.25]] * 2) for ids in IDS]
    results = combine(outputs, IDS, dispatched, weights, elastic_info=ONE_GONE, **WORLD)
    assert results[2] is None
    for rank in (0, 1, 3):
        assert results[rank].tolist() == (1.75 * X[rank].float()).tolist()


def test_scaled_down_combine_add_rms_norm_leaves_dead_ranks_out():
    dispatched = dispatch(X, IDS, elastic_info=ONE_GONE, **WORLD)
    outputs = [None if d is None else d.expand_x for d in dispatched]
    weights = [None if ids is None else torch.tensor([[0.5, 0.25]] * 2) for ids in IDS]
    residual = [None if x is None else x[:, None] for x in X]
    results = combine_add_rms_norm(
        outputs,
        IDS,
        dispatched,
        weights,
        residual,
        torch.ones(2, dtype=torch.bfloat16),
        elastic_info=ONE_GONE,
        **WORLD,
    )
    assert results[2] is None
    assert results[3][2][:, 0].tolist() == (2.75 * X[3].float()).bfloat16().tolist()


def test_virtual_ids_start_behind_the_new_experts():
    """Id 4 was MoE expert 4 of 6; with 4 left it is the zero expert."""
    ids = [None if entry is None else torch.where(entry == 3, 4, entry) for entry in IDS]
    dispatched = dispatch(X, ids, elastic_info=ONE_GONE, zero_expert_num=1, **WORLD)
    assert dispatched[3].expert_token_nums.tolist() == [3, 0]
    outputs = [None if d is None else d.expand_x for d in dispatched]
    weights = [None if entry is None else torch.tensor([[0.5, 0.25]] * 2) for entry in ids]
    results = combine(outputs, ids, dispatched, weights, elastic_info=ONE_GONE, zero_expert_num=1, **WORLD)
    assert results[0][:, 0].tolist() == [0.0, 1.25]  # token 1 of rank 0: ids [4, 1], 0.25 + shared


@pytest.mark.parametrize("old_ranks", [[0, 1, 3], [3, 0, 1], [1, 3, 0]])
def test_a_scaled_down_world_equals_a_small_world_with_the_new_ranks(old_ranks):
    """Whatever the remapping (no shared ranks here): rows, assist info and counts are those of a fresh world of 3."""
    table1 = [old_ranks.index(old) if old in old_ranks else -1 for old in range(4)]
    vector = torch.tensor([1, 3, 0, 6, *table1, *old_ranks, -1], dtype=torch.int32)
    x = [labelled(old) for old in range(4)]
    ids = [torch.tensor([[(old + 2) % 6, 5], [old, 4]]) for old in range(4)]
    alive = [rank if rank in old_ranks else None for rank in range(4)]
    elastic = dispatch(
        [None if rank is None else x[rank] for rank in alive],
        [None if rank is None else ids[rank] for rank in alive],
        num_experts=8,
        elastic_info=vector,
    )
    small = dispatch([x[old] for old in old_ranks], [ids[old] for old in old_ranks], num_experts=6)
    for new, old in enumerate(old_ranks):
        n = int(small[new].ep_recv_counts[-1])
        assert torch.equal(elastic[old].expand_x[:n], small[new].expand_x[:n])
        assert not elastic[old].expand_x[n:].any()
        assert torch.equal(elastic[old].assist_info_for_combine[: 3 * n], small[new].assist_info_for_combine[: 3 * n])
        assert elastic[old].ep_recv_counts.tolist() == [*small[new].ep_recv_counts.tolist(), 0, 0]
        assert torch.equal(elastic[old].expert_token_nums, small[new].expert_token_nums)
        assert len(elastic[old].expand_x) == 16  # 2·4 tokens, min(2, 2) experts; a fresh world of 3 has 12
        assert len(small[new].expand_x) == 12


def test_a_vector_that_is_not_scaled_down_changes_only_the_capacity():
    """The shared rank's A is max(16, 8) instead of 8; whatever else stands in the vector is not read."""
    x = [labelled(rank) for rank in range(4)]
    ids = [torch.tensor([[0, 3], [5, 0]])] * 4
    vector = torch.full((12,), 77, dtype=torch.int32)
    vector[0] = 0
    plain, elastic = dispatch(x, ids, **WORLD), dispatch(x, ids, elastic_info=vector, **WORLD)
    assert [len(result.expand_x) for result in plain] == [8, 16, 16, 16]
    assert [len(result.expand_x) for result in elastic] == [16] * 4
    for before, after in zip(plain, elastic, strict=True):
        n = int(before.ep_recv_counts[-1])
        assert torch.equal(before.expand_x[:n], after.expand_x[:n])
        assert not after.expand_x[n:].any()
        assert torch.equal(before.assist_info_for_combine[: 3 * n], after.assist_info_for_combine[: 3 * n])
        assert torch.equal(before.ep_recv_counts, after.ep_recv_counts)
        assert torch.equal(before.expert_token_nums, after.expert_token_nums)


def test_without_shared_ranks_the_capacity_is_that_of_moe_ranks():
    vector = torch.zeros(8, dtype=torch.int32)
    results = dispatch([labelled(0), labelled(1)], [torch.tensor([[0], [1]])] * 2, num_experts=2, elastic_info=vector)
    assert [len(result.expand_x) for result in results] == [4, 4]


def test_when_the_last_shared_rank_is_gone_its_expert_is_gone_but_smoothing_rows_keep_their_numbers():
    """ep 3, old rank 0 was shared and dies; L 2 stays. Rows [127, 1], smoothing row r = [1, r+1]: expert m uses row
    1+m. The new rank 0 is the old MoE rank 1 and keeps a MoE rank's sizes."""
    vector = torch.tensor([1, 2, 0, 4, -1, 0, 1, 1, 2, -1], dtype=torch.int32)
    world = {"num_experts": 4, "shared_expert_num": 1, "shared_expert_rank_num": 1, "elastic_info": vector}
    x = [None, *(torch.tensor([[127.0, 1.0]]).bfloat16() for _ in range(2))]
    ids = [None, torch.tensor([[0]]), torch.tensor([[3]])]
    scales = torch.tensor([[1.0, r + 1.0] for r in range(5)])
    dispatched = dispatch(x, ids, scales=scales, quant_mode=2, **world)
    assert [dispatched[old].expand_x[0].tolist() for old in (1, 2)] == [[127, 2], [127, 5]]
    assert [dispatched[old].ep_recv_counts.tolist() for old in (1, 2)] == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert [dispatched[old].expert_token_nums.tolist() for old in (1, 2)] == [[1, 0], [0, 1]]
    outputs = [None, *(d.expand_x.float() for d in dispatched[1:])]
    results = combine(outputs, ids, dispatched, [None, torch.ones((1, 1)), torch.ones((1, 1))], **world)
    assert [results[old].tolist() for old in (1, 2)] == [[[127.0, 2.0]], [[127.0, 5.0]]]
