"""The weighted sum against a loop over numbers, at widths around the ones at which the compiled one turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.ops.weighted_sum import WIDTH, add_rows, sum_dtype, sum_rows
from tests.worlds import assert_same_bits


def plain_sum(total: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    result = total.numpy().copy()
    for token in range(position.shape[0]):
        for k in range(position.shape[1]):
            if position[token, k] >= 0:
                term = weights[token, k].numpy() * rows[position[token, k]].to(total.dtype).numpy()
                result[token] = result[token] + term
    return torch.from_numpy(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [0, 1, 31, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH + 7])
def test_every_product_is_rounded_and_added_in_turn(dtype, hidden):
    generator = torch.Generator().manual_seed(hidden)
    for tokens, top_k, count in [(0, 2, 0), (3, 0, 2), (1, 1, 1), (5, 4, 9), (2, 3, 0)]:
        total = torch.randn((tokens, hidden), generator=generator, dtype=sum_dtype(dtype))
        rows = torch.randn((count, hidden), generator=generator).to(dtype)
        position = torch.randint(-1, max(count, 1), (tokens, top_k), generator=generator).clamp_(max=count - 1)
        weights = torch.rand((tokens, top_k), generator=generator, dtype=sum_dtype(dtype))
        expected = plain_sum(total, rows, position, weights)
        add_rows(total, rows, position, weights)
        assert_same_bits(total, expected, f"{tokens} tokens")
        zeros = torch.zeros((tokens, hidden), dtype=sum_dtype(dtype))
        expected = plain_sum(zeros, rows, position, weights).to(dtype)
        assert_same_bits(sum_rows(rows, position, weights), expected, f"{tokens} tokens, rounded")


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_sums_of_any_bits_are_rounded_as_torch_rounds(seed, top_k, hidden):
    """Every bit pattern of bfloat16: subnormals, infinities, NaN, ties of the last rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-(2**15), 2**15, (top_k, hidden), generator=generator).to(torch.int16).view(torch.bfloat16)
    weights = torch.tensor([0.0, -0.0, 0.5, 1.0, 1 + 2**-8, 3e38, 1e-40])
    weights = weights[torch.randint(len(weights), (2, top_k), generator=generator)]
    position = torch.stack([torch.arange(top_k), torch.randperm(top_k, generator=generator)])
    with np.errstate(all="ignore"):
        expected = plain_sum(torch.zeros((2, hidden)), rows, position, weights).to(torch.bfloat16)
    assert_same_bits(sum_rows(rows, position, weights), expected, "y")


def test_rows_and_positions_may_lie_apart():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((40, 6), generator=generator).bfloat16().T
    position, weights = torch.tensor([[0, 5], [-1, 3], [2, -1]]).T, torch.rand((3, 2), generator=generator).T
    total = torch.zeros((2, 40))
    add_rows(total, rows, position, weights)
    assert_same_bits(total, plain_sum(torch.zeros((2, 40)), rows, position, weights), "sums")


def test_numbers_that_are_none():
    """Infinities, NaN, and what a position without a row must not touch."""
    rows = torch.tensor([[float("inf"), 1.0], [-float("inf"), float("nan")]]).bfloat16()
    total = torch.zeros((3, 2))
    weights = torch.tensor([[1.0, 1.0], [0.5, float("nan")], [2.0, 0.0]])
    add_rows(total, rows, torch.tensor([[0, 1], [0, -1], [-1, -1]]), weights)
    assert total.isnan().tolist() == [[True, True], [False, False], [False, False]]
    assert total[1].tolist() == [float("inf"), 0.5]
    assert total[2].tolist() == [0.0, 0.0]
