"""dispatch against the worked examples of the specification (§2.15) and its rules, by hand.

A token's row holds its label 10·(source rank) + token, so that an output row says where it came from.
"""

from __future__ import annotations

import pytest
import torch

from evenmoe.reference.dispatch import dispatch


def labelled(num_ranks: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [
        torch.tensor([[10 * rank + token] * 3 for token in range(num_tokens)], dtype=dtype).reshape(num_tokens, 3)
        for rank in range(num_ranks)
    ]


def as_ids(*ids: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(rank_ids, dtype=torch.int32) for rank_ids in ids]


def check(result, *, rows, assist, recv, nums):
    """Compare one rank's outputs with the written parts, and find zeros behind them."""
    assert result.expand_x[: len(rows), 0].tolist() == rows
    assert (result.expand_x == result.expand_x[:, :1]).all()
    assert not result.expand_x[len(rows) :].any()
    flat = [number for info in assist for number in info]
    assert result.assist_info_for_combine[: len(flat)].tolist() == flat
    assert not result.assist_info_for_combine[len(flat) :].any()
    assert result.ep_recv_counts.tolist() == recv
    assert result.expert_token_nums.tolist() == nums
    assert not result.expand_scales.any()


# --- §2.15: rank 0 hosts the shared expert, ranks 1…3 two experts each ---

IDS = as_ids([[0, 3], [5, 0]], [[1, 2], [0, 4]], [[3, 5], [3, 1]], [[2, 0], [4, 5]])
WORLD = {"num_experts": 6, "shared_expert_num": 1, "shared_expert_rank_num": 1}

ROWS = [[0, 1, 10, 11, 20, 21, 30, 31], [0, 1, 11, 30, 10, 21], [10, 30, 0, 20, 21], [11, 31, 1, 20, 31]]
ASSIST = [
    [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2), (3, 0, 2), (3, 1, 2)],
    [(0, 0, 0), (0, 1, 1), (1, 1, 0), (3, 0, 1), (1, 0, 0), (2, 1, 1)],
    [(1, 0, 1), (3, 0, 0), (0, 0, 1), (2, 0, 0), (2, 1, 0)],
    [(1, 1, 1), (3, 1, 0), (0, 1, 0), (2, 0, 1), (3, 1, 1)],
]
RECV = [[2, 4, 6, 8], [2, 3, 3, 4, 4, 5, 6, 6], [0, 1, 1, 2, 3, 3, 5, 5], [0, 1, 1, 2, 3, 3, 4, 5]]
NUMS = {1: [[8], [4, 2], [2, 3], [2, 3]], 0: [[8], [4, 6], [2, 5], [2, 5]]}


@pytest.mark.parametrize("nums_type", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_worked_example(nums_type, dtype):
    results = dispatch(labelled(4, 2, dtype), IDS, expert_token_nums_type=nums_type, **WORLD)
    for rank, result in enumerate(results):
        check(result, rows=ROWS[rank], assist=ASSIST[rank], recv=RECV[rank], nums=NUMS[nums_type][rank])
        assert result.expand_x.dtype == dtype
        assert not result.dynamic_scales.any()


def test_worked_example_with_a_mask():
    masks = [torch.ones((2, 2), dtype=torch.bool) for _ in range(4)]
    masks[2] = torch.tensor([[True, False], [False, False]])
    results = dispatch(labelled(4, 2), IDS, x_active_mask=masks, **WORLD)
    rows = [[0, 1, 10, 11, 20, 30, 31], [0, 1, 11, 30, 10], [10, 30, 0, 20], [11, 31, 1, 31]]
    assist = [
        [info for info in ASSIST[0] if info != (2, 1, 2)],
        [info for info in ASSIST[1] if info != (2, 1, 1)],
        [info for info in ASSIST[2] if info != (2, 1, 0)],
        [info for info in ASSIST[3] if info != (2, 0, 1)],
    ]
    recv = [[2, 4, 5, 7], [2, 3, 3, 4, 4, 5, 5, 5], [0, 1, 1, 2, 3, 3, 4, 4], [0, 1, 1, 2, 3, 3, 3, 4]]
    nums = [[7], [4, 1], [2, 2], [2, 2]]
    for rank, result in enumerate(results):
        check(result, rows=rows[rank], assist=assist[rank], recv=recv[rank], nums=nums[rank])


def test_worked_example_with_two_shared_experts():
    ids = as_ids(*([[s % 4, (s + 1) % 4]] for s in range(8)))
    results = dispatch(labelled(8, 1), ids, num_experts=4, shared_expert_num=2, shared_expert_rank_num=4)
    even, odd = [0, 2, 4, 6], [1, 3, 5, 7]
    for rank, sources, k in [(0, even, 2), (1, odd, 2), (2, even, 3), (3, odd, 3)]:
        recv = [sum(source <= s for source in sources) for s in range(8)]
        assist = [(source, 0, k) for source in sources]
        check(results[rank], rows=[10 * s for s in sources], assist=assist, recv=recv, nums=[4])
    assist = [(0, 0, 0), (3, 0, 1), (4, 0, 0), (7, 0, 1)]
    check(results[4], rows=[0, 30, 40, 70], assist=assist, recv=[1, 1, 1, 2, 3, 3, 3, 4], nums=[4])
    assert [int(result.expert_token_nums[0]) for result in results[5:]] == [4, 4, 4]


# --- allocated shapes (§2.4, §5) ---


@pytest.mark.parametrize(("tp", "copies"), [(0, 1), (1, 1), (2, 2)])
def test_allocated_shapes(tp, copies):
    """ep 3, 1 shared rank, M 2: L 1. G = 2·3; MoE A = 6·min(1,2) = 6, shared A = 2·⌈3/1⌉ = 6."""
    num_lists = 3 * max(tp, 1)
    ids = as_ids(*([[0, 1], [1, 0]] for _ in range(num_lists)))
    results = dispatch(
        labelled(num_lists, 2), ids, num_experts=2, tp_world_size=tp, shared_expert_num=1, shared_expert_rank_num=1
    )
    for result in results:
        assert result.expand_x.shape == (6 * copies, 3)
        assert (result.dynamic_scales.shape, result.dynamic_scales.dtype) == ((6 * copies,), torch.float32)
        assert (result.assist_info_for_combine.shape, result.assist_info_for_combine.dtype) == ((768,), torch.int32)
        assert (result.expert_token_nums.shape, result.expert_token_nums.dtype) == ((1,), torch.int64)
        assert (result.ep_recv_counts.shape, result.ep_recv_counts.dtype) == ((3 * copies,), torch.int32)
        assert (result.tp_recv_counts.shape, result.tp_recv_counts.dtype) == ((tp,), torch.int32)
        assert (result.expand_scales.shape, result.expand_scales.dtype) == ((6,), torch.float32)
        assert tp == 2 or not result.tp_recv_counts.any()


def test_capacity_counts_experts_or_k_whichever_is_less_and_rounds_shared_groups_up():
    """ep 5, Sn 1, Sr 2 (R 2), M 6 (L 2), Bs 1, K 1: MoE A = 5·min(2,1) = 5; shared A = 1·⌈5/2⌉ = 3."""
    results = dispatch(
        labelled(5, 1), as_ids(*([[5]] for _ in range(5))), num_experts=6, shared_expert_num=1, shared_expert_rank_num=2
    )
    assert [len(result.expand_scales) for result in results] == [3, 3, 5, 5, 5]
    assert [len(result.expert_token_nums) for result in results] == [1, 1, 2, 2, 2]
    assert [len(result.ep_recv_counts) for result in results] == [5, 5, 10, 10, 10]
    assert [len(result.assist_info_for_combine) for result in results] == [384, 384, 640, 640, 640]
    assert results[4].expand_x[:, 0].tolist() == [0, 10, 20, 30, 40]  # the hot expert fills its rank exactly
    assert results[0].expand_x[:, 0].tolist() == [0, 20, 40]


def test_ranks_with_different_numbers_of_tokens():
    """Bs 3, 0, 1: global_bs = 3·3, the largest times ep."""
    x = [labelled(3, n)[rank] for rank, n in enumerate([3, 0, 1])]
    ids = [torch.tensor([[0], [2], [0]]), torch.zeros((0, 1), dtype=torch.int64), torch.tensor([[0]])]
    results = dispatch(x, ids, num_experts=3, global_bs=9)
    check(results[0], rows=[0, 2, 20], assist=[(0, 0, 0), (0, 2, 0), (2, 0, 0)], recv=[2, 2, 3], nums=[3])
    check(results[1], rows=[], assist=[], recv=[0, 0, 0], nums=[0])
    check(results[2], rows=[1], assist=[(0, 1, 0)], recv=[1, 1, 1], nums=[1])
    assert [result.expand_x.shape for result in results] == [(9, 3)] * 3


# --- masks (§2.9) and virtual experts (§2.10) ---


def test_of_a_one_dimensional_mask_only_the_number_of_true_counts():
    masks = [torch.tensor([False, True]), torch.tensor([False, False])]
    results = dispatch(labelled(2, 2), as_ids([[0], [1]], [[0], [1]]), num_experts=2, x_active_mask=masks)
    check(results[0], rows=[0], assist=[(0, 0, 0)], recv=[1, 1], nums=[1])
    check(results[1], rows=[], assist=[], recv=[0, 0], nums=[0])


def test_a_one_dimensional_mask_holds_for_shared_experts_too():
    masks = [torch.tensor([True, False]), torch.tensor([False, False])]
    results = dispatch(
        labelled(2, 2),
        as_ids([[0], [0]], [[0], [0]]),
        num_experts=1,
        shared_expert_num=1,
        shared_expert_rank_num=1,
        x_active_mask=masks,
    )
    check(results[0], rows=[0], assist=[(0, 0, 1)], recv=[1, 1], nums=[1])
    check(results[1], rows=[0], assist=[(0, 0, 0)], recv=[1, 1], nums=[1])


def test_a_two_dimensional_mask_keeps_the_original_token_and_k():
    """Source 0: only (0,1) and (2,0) are sent; token 1 has no True entry, so it does not see the shared expert."""
    masks = [torch.tensor([[False, True], [False, False], [True, False]]), torch.zeros((3, 2), dtype=torch.bool)]
    results = dispatch(
        labelled(2, 3),
        as_ids([[1, 0], [0, 1], [0, 1]], [[0, 1]] * 3),
        num_experts=2,
        shared_expert_num=1,
        shared_expert_rank_num=1,
        x_active_mask=masks,
    )
    check(results[0], rows=[0, 2], assist=[(0, 0, 2), (0, 2, 2)], recv=[2, 2], nums=[2])
    check(results[1], rows=[0, 2], assist=[(0, 0, 1), (0, 2, 0)], recv=[2, 2, 2, 2], nums=[2, 0])


def test_virtual_experts_are_not_sent_but_do_not_keep_a_token_from_the_shared_expert():
    """M 2; ids 2, 3, 4 are a zero, a copy and a const expert."""
    results = dispatch(
        labelled(2, 2),
        as_ids([[2, 3], [4, 1]], [[0, 2], [3, 4]]),
        num_experts=2,
        shared_expert_num=1,
        shared_expert_rank_num=1,
        zero_expert_num=1,
        copy_expert_num=1,
        const_expert_num=1,
    )
    assist = [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    check(results[0], rows=[0, 1, 10, 11], assist=assist, recv=[2, 4], nums=[4])
    check(results[1], rows=[10, 1], assist=[(1, 0, 0), (0, 1, 1)], recv=[0, 1, 2, 2], nums=[1, 1])


# --- TP (§2.12) ---


@pytest.mark.parametrize("nums_type", [0, 1])
def test_tp_peers_hold_the_same_rows_own_first(nums_type):
    """ep 2, tp 2, one token each. List entry d = 2·(EP rank) + TP rank, labels 0, 10, 20, 30; a token crosses EP to
    the same TP rank: entry 1's token (expert 1) goes to entry 3, entry 3's (expert 0) to entry 1."""
    results = dispatch(
        labelled(4, 1),
        as_ids([[0]], [[1]], [[0]], [[0]]),
        num_experts=2,
        tp_world_size=2,
        expert_token_nums_type=nums_type,
    )
    check(results[0], rows=[0, 20, 30], assist=[(0, 0, 0), (1, 0, 0)], recv=[1, 2, 0, 1], nums=[3])
    check(results[1], rows=[30, 0, 20], assist=[(1, 0, 0)], recv=[0, 1, 1, 2], nums=[3])
    check(results[2], rows=[10], assist=[], recv=[0, 0, 1, 1], nums=[1])
    check(results[3], rows=[10], assist=[(0, 0, 0)], recv=[1, 1, 0, 0], nums=[1])
    assert [result.tp_recv_counts.tolist() for result in results] == [[2, 1], [2, 1], [0, 1], [0, 1]]


def test_tp_shared_ranks():
    """ep 2, tp 2, rank 0 shared: entry 0 gets the tokens of entries 0 and 2, entry 1 those of 1 and 3."""
    results = dispatch(
        labelled(4, 1),
        as_ids(*([[0]] for _ in range(4))),
        num_experts=1,
        tp_world_size=2,
        shared_expert_num=1,
        shared_expert_rank_num=1,
    )
    for d, rows in enumerate([[0, 20, 10, 30], [10, 30, 0, 20]] * 2):
        assist = [(0, 0, 1 - d // 2), (1, 0, 1 - d // 2)]
        check(results[d], rows=rows, assist=assist, recv=[1, 2, 1, 2], nums=[4])
        assert results[d].tp_recv_counts.tolist() == [2, 2]


# --- quant_mode 2 (§2.8): rows [127, 1], smoothing row r = [1, r+1], so the second int8 is r+1 and every scale 1 ---


def smoothing(num_rows: int) -> torch.Tensor:
    return torch.tensor([[1.0, r + 1.0] for r in range(num_rows)])


def test_the_smoothing_rows_of_shared_experts_come_first():
    x = [torch.tensor([[127.0, 1.0]]).bfloat16() for _ in range(3)]
    results = dispatch(
        x,
        as_ids([[0]], [[1]], [[1]]),
        num_experts=2,
        scales=smoothing(4),
        quant_mode=2,
        shared_expert_num=2,
        shared_expert_rank_num=2,
    )
    assert [result.expand_x.dtype for result in results] == [torch.int8] * 3
    assert [result.expand_x[:, 1].tolist() for result in results] == [[1, 1, 1], [2, 2, 2], [3, 4, 4]]
    assert results[2].expand_x[:, 0].tolist() == [127, 127, 127]
    assert [result.dynamic_scales.tolist() for result in results] == [[1.0, 1.0, 1.0]] * 3


def test_without_shared_ranks_smoothing_row_m_belongs_to_expert_m_and_the_senders_rows_count():
    x = [torch.tensor([[127.0, 1.0]]).bfloat16(), torch.tensor([[-127.0, 2.0]]).bfloat16()]
    per_rank = [smoothing(2), 2 * smoothing(2)]  # source 1: v = (−254, 4·(m+1)), d = 1/2
    results = dispatch(x, as_ids([[0, 1]], [[0, 1]]), num_experts=2, scales=per_rank, quant_mode=2)
    assert results[0].expand_x.tolist() == [[127, 1], [-127, 2]]
    assert results[1].expand_x.tolist() == [[127, 2], [-127, 4]]
    assert results[0].dynamic_scales.tolist() == [1.0, 2.0]


def test_tp_peers_exchange_dynamic_scales_in_the_order_of_the_rows():
    x = [torch.tensor([[127.0 * 2**d, 0.0]]).bfloat16() for d in range(4)]
    results = dispatch(x, as_ids([[0]], [[1]], [[0]], [[0]]), num_experts=2, tp_world_size=2, quant_mode=2)
    assert [result.dynamic_scales.tolist() for result in results] == [
        [1.0, 4.0, 8.0, 0.0],
        [8.0, 1.0, 4.0, 0.0],
        [2.0, 0.0, 0.0, 0.0],
        [2.0, 0.0, 0.0, 0.0],
    ]
