"""combine by hand: the order of the sum, its roundings, masks, TP, virtual experts and the int8 transport (§3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.reference.combine import accumulate, combine
from evenmoe.reference.dispatch import dispatch


def one_token(outputs, ids=None, weights=None, dtype=torch.float32, num_shared=0, **keywords):
    """One token whose experts (one a rank behind `num_shared` shared ranks) answer with given numbers, H = 1."""
    num_moe = len(outputs) - num_shared
    ids = list(range(num_moe)) if ids is None else ids
    world = {"num_experts": num_moe, "shared_expert_num": num_shared, "shared_expert_rank_num": num_shared}
    num_ranks = len(outputs)
    tokens = [torch.zeros((1, 1), dtype=dtype)] * num_ranks
    all_ids = [torch.tensor([ids])] * num_ranks
    only_rank_0 = [torch.full((1, len(ids)), rank == 0) for rank in range(num_ranks)]
    dispatched = dispatch(tokens, all_ids, x_active_mask=only_rank_0, **world)
    rows = [torch.full_like(d.expand_x, float(value)) for d, value in zip(dispatched, outputs, strict=True)]
    scales = [torch.tensor([[1.0] * len(ids) if weights is None else weights], dtype=torch.float32)] * num_ranks
    return combine(rows, all_ids, dispatched, scales, x_active_mask=only_rank_0, **world, **keywords)[0].item()


BIG = 2.0**24  # BIG + 1 is BIG in fp32


@pytest.mark.parametrize(("ids", "total"), [([0, 1, 2], 0.0), ([0, 2, 1], 1.0), ([1, 0, 2], 0.0), ([2, 0, 1], 1.0)])
def test_the_sum_runs_by_ascending_k_not_by_expert(ids, total):
    assert one_token([BIG, 1.0, -BIG], ids) == total


def test_a_product_is_rounded_before_it_is_added():
    """fp32(0.1)·fp32(0.7) is inexact; minus its rounded value it is 0, fused it would be the rounding error."""
    w, v = np.float32(0.1), np.float32(0.7)
    product = w * v
    assert float(product) != float(w) * float(v)
    assert one_token([-product, v], weights=[1.0, w]) == 0.0


@pytest.mark.parametrize(
    ("outputs", "total"),
    [([1.0, 2**-8, 2**-8], 1.0078125), ([1.0, 2**-8], 1.0), ([1.0078125, 2**-8], 1.015625)],
)
def test_the_sum_is_rounded_to_bf16_once_ties_to_even(outputs, total):
    assert one_token(outputs, dtype=torch.bfloat16) == total


def test_fp16_tokens():
    assert one_token([1.0, 2**-11, 2**-11], dtype=torch.float16) == 1.0 + 2**-10


def test_shared_experts_come_after_the_weighted_ones_unweighted_and_in_order():
    """((0.5·2 + 2²⁴) − 2²⁴): 1 is lost in the first addition; any other order, or a weight, keeps or changes it."""
    assert one_token([BIG, -BIG, 2.0], ids=[0], weights=[0.5], num_shared=2) == 0.0
    assert one_token([-1.0, 3.0, 2.0], ids=[0], weights=[0.5], num_shared=2) == 3.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1)])
def test_shared_expert_x_comes_last_unweighted(shape):
    shared = [torch.full(shape, -BIG)] * 2
    assert one_token([BIG, 1.0], weights=[1.0, 1.0], shared_expert_x=shared) == 0.0


def test_the_three_dimensional_shared_expert_x_counts_tokens_in_row_major_order():
    ids, x = [torch.zeros((4, 1), dtype=torch.int32)], [torch.ones((4, 3))]
    dispatched = dispatch(x, ids, num_experts=1)
    shared = torch.arange(12.0).reshape(2, 2, 3)
    (result,) = combine(
        [dispatched[0].expand_x], ids, dispatched, [torch.ones((4, 1))], num_experts=1, shared_expert_x=[shared]
    )
    assert torch.equal(result, 1.0 + torch.arange(12.0).reshape(4, 3))


# --- masks (§2.9, §3.4) ---


def masked(mask, **keywords):
    """Three tokens 1, 2, 3 to experts 0, 1 that answer with the token; weights 1 and 10; rows behind the received ones
    are NaN and must not be read."""
    ids, x = [torch.tensor([[0, 1]] * 3)], [torch.tensor([[1.0], [2.0], [3.0]])]
    dispatched = dispatch(x, ids, num_experts=2, x_active_mask=[mask])
    rows = dispatched[0].expand_x.clone()
    rows[int(dispatched[0].ep_recv_counts[-1]) :] = float("nan")
    scales = [torch.tensor([[1.0, 10.0]] * 3)]
    (result,) = combine([rows], ids, dispatched, scales, num_experts=2, x_active_mask=[mask], **keywords)
    return result.flatten().tolist()


def test_without_a_mask_all_tokens_take_part():
    assert masked(None) == [11.0, 22.0, 33.0]


def test_rows_of_tokens_behind_a_one_dimensional_mask_are_zero():
    shared = [torch.full((3, 1), 100.0)]
    assert masked(torch.tensor([False, True, True]), shared_expert_x=shared) == [111.0, 122.0, 0.0]


def test_a_two_dimensional_mask_drops_single_assignments_and_inactive_tokens():
    mask = torch.tensor([[False, True], [False, False], [True, False]])
    assert masked(mask) == [10.0, 0.0, 3.0]
    assert masked(mask, shared_expert_x=[torch.full((3, 1), 100.0)]) == [110.0, 0.0, 103.0]


def test_active_flags():
    ids, x = [torch.tensor([[0], [0]])], [torch.ones((2, 1))]
    mask = [torch.tensor([True, False])]
    dispatched = dispatch(x, ids, num_experts=1, x_active_mask=mask)
    (sums,) = accumulate(
        [dispatched[0].expand_x], ids, dispatched, [torch.ones((2, 1))], num_experts=1, x_active_mask=mask
    )
    assert sums.active == [True, False]
    assert sums.values.dtype == torch.float32
    assert sums.values.tolist() == [[1.0], [0.0]]


# --- TP (§3.3) ---


def test_the_tp_sum_is_rounded_before_the_weighted_sum():
    """bf16, three experts: 1 on one peer, 2⁻⁸ on the other. 1 + 2⁻⁸ is a tie → 1, so the sum is 3; unrounded it would
    be 3.0117 → 3.015625."""
    ids = [torch.tensor([[0, 1, 2]])] * 6
    x = [torch.zeros((1, 2), dtype=torch.bfloat16)] * 6
    dispatched = dispatch(x, ids, num_experts=3, tp_world_size=2)
    rows = [torch.full_like(d.expand_x, 1.0 if d_index % 2 == 0 else 2**-8) for d_index, d in enumerate(dispatched)]
    results = combine(rows, ids, dispatched, [torch.ones((1, 3))] * 6, num_experts=3, tp_world_size=2)
    assert [result.tolist() for result in results] == [[[3.0, 3.0]]] * 6


def test_tp_pairs_the_copies_of_the_same_token():
    """Uneven peers: entry 1 sends everything to expert 1, the others to expert 0. Each peer answers row + 1000·(its TP
    rank + 1), so every token comes back as 2·x + 3000."""
    ids = [torch.tensor([[0], [0]]), torch.tensor([[1], [1]]), torch.tensor([[0], [0]]), torch.tensor([[0], [1]])]
    x = [torch.tensor([[10.0 * d], [10.0 * d + 1.0]]) for d in range(4)]
    dispatched = dispatch(x, ids, num_experts=2, tp_world_size=2)
    rows = [result.expand_x + 1000.0 * (d % 2 + 1) for d, result in enumerate(dispatched)]
    results = combine(rows, ids, dispatched, [torch.ones((2, 1))] * 4, num_experts=2, tp_world_size=2)
    for token, result in zip(x, results, strict=True):
        assert torch.equal(result, 2 * token + 3000.0)


# --- virtual experts (§2.10, §3.4) ---


def virtual(ids, weights, x=(3.0, 1.0), dtype=torch.float32):
    """One MoE expert (id 0) that answers 100; id 1 zero, ids 2 and 3 copy, ids 4 and 5 const."""
    counts = {"zero_expert_num": 1, "copy_expert_num": 2, "const_expert_num": 2}
    token, all_ids = [torch.tensor([x], dtype=dtype)], [torch.tensor([ids])]
    dispatched = dispatch(token, all_ids, num_experts=1, **counts)
    (result,) = combine(
        [torch.full_like(dispatched[0].expand_x, 100.0)],
        all_ids,
        dispatched,
        [torch.tensor([weights], dtype=torch.float32)],
        num_experts=1,
        ori_x=token,
        const_expert_alpha_1=torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=dtype),
        const_expert_alpha_2=torch.tensor([[0.0, 3.0], [1.0, 1.0]], dtype=dtype),
        const_expert_v=[torch.tensor([[5.0, -1.0], [-8.0, 0.5]], dtype=dtype)],
        **counts,
    )
    return result[0].tolist()


def test_zero_and_copy_experts():
    assert virtual([1], [7.0]) == [0.0, 0.0]
    assert virtual([2], [0.5]) == [1.5, 0.5]
    assert virtual([3, 1, 0, 2], [2.0, 9.0, 0.25, -1.0]) == [3.0 + 25.0, 1.0 + 25.0]


def test_a_const_expert_with_equal_logits():
    """x = (3, 1): a1 = 3, a2 = 3, p = ½ each, inner = ½·(3, 1) + ½·(5, −1) = (4, 0)."""
    assert virtual([4], [0.25]) == [1.0, 0.0]
    assert virtual([0, 4], [1.0, 0.25]) == [101.0, 100.0]


def test_a_const_expert_with_different_logits():
    """a1 = 6, a2 = 4: p1 = 1/(1+e⁻²). Five fp32 roundings lie between p1 and the result: 8u of the largest term."""
    p1 = 1.0 / (1.0 + np.exp(-2.0))
    expected = [p1 * 3.0 + (1.0 - p1) * -8.0, p1 * 1.0 + (1.0 - p1) * 0.5]
    assert virtual([5], [1.0]) == pytest.approx(expected, rel=0, abs=8 * 2.0**-24 * 3.0)


def test_a_const_expert_reads_narrow_types_widened():
    """bf16, x = (43/128, 129/128): a1 = x0 = 43/128, a2 = 3·x1 = 387/128 has 9 bits and would round to 388/128. Then
    inner = p1·x + p2·v to fp32 precision (8u of the largest term 5), rounded once to bf16 by the token sum."""
    x0, x1 = 43 / 128, 129 / 128
    p1 = 1.0 / (1.0 + np.exp(3 * x1 - x0))
    weight = 2.0**-10
    got = virtual([4], [weight], x=(x0, x1), dtype=torch.bfloat16)
    assert got == [float(torch.tensor(weight * v).bfloat16()) for v in (p1 * x0 + (1 - p1) * 5, p1 * x1 - (1 - p1))]


@settings(deadline=None)  # a shared machine may stall any single example
@given(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32), st.floats(-2, 2, width=32))
def test_const_experts_follow_the_fixed_roundings(x0, x1, weight):
    """The same in numpy fp32 scalars, each operation on its own line of the definition; bit for bit."""
    f = np.float32
    x, w = [f(x0), f(x1)], f(weight)
    a1 = (f(2) * x[0]) + (f(0) * x[1])
    a2 = (f(1) * x[0]) + (f(1) * x[1])
    largest = max(a1, a2)
    e1, e2 = f(np.exp(np.float64(a1 - largest))), f(np.exp(np.float64(a2 - largest)))
    p1, p2 = e1 / (e1 + e2), e2 / (e1 + e2)
    expected = [f(0) + w * ((p1 * x[i]) + (p2 * v)) for i, v in enumerate((f(-8), f(0.5)))]
    assert virtual([5], [float(w)], x=(float(x0), float(x1))) == [float(value) for value in expected]


# --- comm_quant_mode 2 (§3.5) ---


def test_moe_and_shared_rows_cross_as_int8():
    """fp16, block max 127 → scale 1: 2.5 arrives as 2, 3.5 as 4. MoE 0.5·(127, 2), shared (127, 4)."""
    ids = [torch.tensor([[0]])] * 2
    world = {"num_experts": 1, "shared_expert_num": 1, "shared_expert_rank_num": 1}
    x = [torch.zeros((1, 2), dtype=torch.float16)] * 2
    dispatched = dispatch(x, ids, **world)
    rows = [torch.tensor([[127.0, 3.5]] * 2).half(), torch.tensor([[127.0, 2.5]] * 2).half()]
    weights = [torch.tensor([[0.5]])] * 2
    plain = combine(rows, ids, dispatched, weights, **world)
    quantised = combine(rows, ids, dispatched, weights, comm_quant_mode=2, **world)
    assert [result.tolist() for result in plain] == [[[190.5, 4.75]]] * 2
    assert [result.tolist() for result in quantised] == [[[190.5, 5.0]]] * 2
