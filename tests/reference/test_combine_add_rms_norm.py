"""combine_add_rms_norm bit for bit against an independent fp32/bf16 evaluation in numpy (§4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenmoe.reference.combine import combine_add_rms_norm
from evenmoe.reference.dispatch import dispatch


def bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16 (as fp32) on the bits: add half a unit, minus one when the kept bit is even, and cut."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def tree(values: np.ndarray) -> np.float32:
    """The fixed tree as a recursion over a power of two of entries."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return tree(values[:half] + values[half:])


def expected_outputs(x32: np.ndarray, gamma: np.ndarray, epsilon: float):
    hidden = len(x32)
    padded = np.zeros(1 << (hidden - 1).bit_length(), dtype=np.float32)
    padded[:hidden] = (x32 * x32) * np.float32(1.0 / hidden)
    rstd = np.float32(1.0) / np.sqrt(tree(padded) + np.float32(epsilon))
    return bf16(bf16(x32 * rstd) * gamma), rstd, bf16(x32)


def run(outputs, residual, gamma, mask=None, **keywords):
    """One rank, one expert with weight 1 whose outputs are given: (Bs,H) rows."""
    num_tokens = len(outputs)
    ids = [torch.zeros((num_tokens, 1), dtype=torch.int32)]
    masks = None if mask is None else [mask]
    dispatched = dispatch([outputs], ids, num_experts=1, x_active_mask=masks)
    return combine_add_rms_norm(
        [dispatched[0].expand_x],
        ids,
        dispatched,
        [torch.ones((num_tokens, 1))],
        [residual],
        gamma,
        num_experts=1,
        x_active_mask=masks,
        **keywords,
    )[0]


def random_bf16(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32)).bfloat16()


@pytest.mark.parametrize("hidden", [1, 2, 3, 8, 100, 1025])
@pytest.mark.parametrize("per_token_gamma", [False, True])
def test_bit_for_bit(hidden, per_token_gamma):
    generator = np.random.default_rng(hidden)
    outputs, residual = random_bf16(generator, 5, hidden), random_bf16(generator, 5, 1, hidden)
    gamma = random_bf16(generator, 5, 1, hidden) if per_token_gamma else random_bf16(generator, hidden)
    y, rstd, x = run(outputs, residual, [gamma] if per_token_gamma else gamma, norm_eps=1e-3)
    assert (y.shape, rstd.shape, x.shape) == ((5, 1, hidden), (5, 1, 1), (5, 1, hidden))
    assert (y.dtype, rstd.dtype, x.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    for token in range(5):
        x32 = (outputs[token].float() + residual[token, 0].float()).numpy()
        of_token = gamma[token, 0] if per_token_gamma else gamma
        want_y, want_rstd, want_x = expected_outputs(x32, of_token.float().numpy(), 1e-3)
        assert y[token, 0].float().numpy().tobytes() == want_y.tobytes()
        assert rstd[token].numpy().tobytes() == want_rstd.tobytes()
        assert x[token, 0].float().numpy().tobytes() == want_x.tobytes()


def test_the_combined_sum_is_not_rounded_before_the_residual():
    """1 + 2⁻⁸ would round to 1 and 1 + 2⁻⁸ again to 1; unrounded the two make 1 + 2⁻⁷. Two experts, H = 1."""
    ids, x = [torch.tensor([[0, 1]])], [torch.zeros((1, 1), dtype=torch.bfloat16)]
    dispatched = dispatch(x, ids, num_experts=2)
    rows = [torch.tensor([[1.0], [2**-8]], dtype=torch.bfloat16)]
    residual = [torch.full((1, 1, 1), 2**-8, dtype=torch.bfloat16)]
    gamma = torch.ones(1, dtype=torch.bfloat16)
    (result,) = combine_add_rms_norm(
        rows, ids, dispatched, [torch.ones((1, 2))], residual, gamma, num_experts=2, norm_eps=0.0
    )
    assert result[2].item() == 1.0078125


def test_the_norm_uses_the_unrounded_x():
    """x32 = (1 + 2⁻⁸, 0), a tie that rounds to (1, 0): ms = ½·(1+2⁻⁸)², rstd = √2/(1+2⁻⁸), not √2."""
    outputs = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[[2**-8, 0.0]]], dtype=torch.bfloat16)
    y, rstd, x = run(outputs, residual, torch.ones(2, dtype=torch.bfloat16), norm_eps=0.0)
    assert x.tolist() == [[[1.0, 0.0]]]
    # three roundings (square, root, quotient), u = 2⁻²⁴ each
    assert rstd.item() == pytest.approx(np.sqrt(2.0) / (1 + 2**-8), rel=3 * 2.0**-24)
    assert y.tolist() == [[[float(bf16(np.float32(np.sqrt(2.0)))), 0.0]]]


def test_the_normalised_row_is_rounded_before_gamma():
    """x = (1, 1, 0): t = bf16(√1.5) = 157/128; times gamma 1.5 it is 235.5/128, a tie → 236/128. Unrounded, √1.5·1.5 =
    235.15/128 → 235/128."""
    outputs = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.bfloat16)
    y, _, _ = run(outputs, torch.zeros((1, 1, 3)).bfloat16(), torch.full((3,), 1.5).bfloat16(), norm_eps=0.0)
    assert y[0, 0].tolist() == [236 / 128, 236 / 128, 0.0]


def test_epsilon_keeps_a_zero_row_finite():
    y, rstd, x = run(torch.zeros((1, 4)).bfloat16(), torch.zeros((1, 1, 4)).bfloat16(), torch.ones(4).bfloat16())
    assert (y.any().item(), x.any().item()) == (False, False)
    assert rstd.item() == float(np.float32(1.0) / np.sqrt(np.float32(1e-6)))


def test_inactive_tokens_are_zero_in_all_three():
    outputs, residual = torch.ones((3, 2)).bfloat16(), torch.ones((3, 1, 2)).bfloat16()
    y, rstd, x = run(outputs, residual, torch.ones(2).bfloat16(), mask=torch.tensor([True, False, False]))
    assert x[:, 0].tolist() == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert [y[1:].any().item(), rstd[1:].any().item(), rstd[0].item() > 0.49] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types_give_outputs_of_their_own_type(dtype):
    y, rstd, x = run(torch.full((1, 2), 3.0, dtype=dtype), torch.ones((1, 1, 2), dtype=dtype), torch.ones(2).to(dtype))
    assert (y.dtype, rstd.dtype, x.dtype) == (dtype, torch.float32, dtype)
    assert x.tolist() == [[[4.0, 4.0]]]
