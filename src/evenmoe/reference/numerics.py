"""The numeric definitions that the specification leaves open, fixed once, so that results are equal bit for bit.

The chip's own order of a reduction, and its value for 0/0 in int8, are unknown (§4, §10): these are ours. Every
operation below is one IEEE fp32 operation, rounded to nearest even; a multiply and an add are never fused (§3.4).
"""

from __future__ import annotations

import math

import torch

BLOCK = 8  # elements per transmitted scale under comm_quant_mode 2: the kernel's block, on no page (§3.5)


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a fp32 vector in a fixed tree: pad with +0 to a power of two, then add the upper half to the lower half.

    The specification says only "a hardware tree" (§4). This tree is the same on every machine, vectorises, and its
    rounding error grows with log2 of the length: |error| ≤ log2(n)·2⁻²⁴·Σ|values|, to first order.

    Args:
        values: float32 (n,).

    Returns:
        float32 scalar tensor; 0 for n = 0.

    >>> tree_sum(torch.tensor([1.0, 2.0, 3.0]))  # (1+3) + (2+0)
    tensor(6.)
    >>> tree_sum(torch.tensor([2.0**24, 1.0, 1.0, 1.0]))  # (2^24+1 → 2^24) + (1+1), where left to right loses all ones
    tensor(16777218.)
    """
    size = 1
    while size < len(values):
        size *= 2
    half = torch.zeros(size, dtype=torch.float32)
    half[: len(values)] = values
    while size > 1:
        size //= 2
        half = half[:size] + half[size:]
    return half[0]


def reciprocal_sqrt(value: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(value): a correctly rounded fp32 square root, then one fp32 division (specification §4).

    Not torch.sqrt: on the CPU it may come from a vector library that is off by one in the last bit (torch 2.13 with
    MKL: for one fp32 in six). A float64 root rounded to fp32 is always the correct one, because 53 ≥ 2·24 + 2.

    Args:
        value: float32 scalar tensor ≥ 0.

    Returns:
        float32 scalar tensor.

    >>> reciprocal_sqrt(torch.tensor(6.25))
    tensor(0.4000)
    """
    root = torch.tensor(math.sqrt(float(value)), dtype=torch.float32)
    return torch.tensor(1.0, dtype=torch.float32) / root


def softmax_of_two(logit_1: torch.Tensor, logit_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of two logits, the larger subtracted first (specification §3.4).

    exp is taken in float64 and rounded to fp32 once: fp32 exp differs between libraries in the last bit, a float64
    exp rounded to fp32 does not (but for one case in some 2²⁸, where it falls beside a rounding boundary).

    Args:
        logit_1, logit_2: float32 scalar tensors.

    Returns:
        Their two probabilities, float32 scalar tensors.

    >>> softmax_of_two(torch.tensor(7.0), torch.tensor(7.0))
    (tensor(0.5000), tensor(0.5000))
    """
    largest = torch.maximum(logit_1, logit_2)
    exp_1 = torch.tensor(math.exp(float(logit_1 - largest)), dtype=torch.float32)
    exp_2 = torch.tensor(math.exp(float(logit_2 - largest)), dtype=torch.float32)
    total = exp_1 + exp_2
    return exp_1 / total, exp_2 / total


def quantize_token(row: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one row to int8 with its own scale: quant_mode 2 (specification §2.8).

    An entry whose scaled value is not finite is stored as 0: the chip's conversion is unknown (§10), and 0 is the one
    value that makes an all-zero row come back as zeros.

    Args:
        row: (H,) of any float dtype.
        smooth: float32 (H,) factors, or None.

    Returns:
        int8 (H,), and the dynamic scale, a float32 scalar tensor: int8 · scale ≈ row · smooth. 0 for an all-zero row.

    >>> quantize_token(torch.tensor([254.0, -3.0, 5.0]), None)  # d = 127/254; −1.5 and 2.5 go to the even neighbour
    (tensor([127,  -2,   2], dtype=torch.int8), tensor(2.))
    """
    values = row.float()
    if smooth is not None:
        values = values * smooth
    factor = torch.tensor(127.0, dtype=torch.float32) / values.abs().max()
    scaled = values * factor
    scaled[~torch.isfinite(scaled)] = 0.0
    return torch.round(scaled).to(torch.int8), torch.tensor(1.0, dtype=torch.float32) / factor


def through_int8_transport(row: torch.Tensor) -> torch.Tensor:
    """One row as the receiver sees it under comm_quant_mode 2 (specification §3.5).

    Blocks of 8 elements, the last one may be shorter. The sender divides by the scale in fp32, the receiver multiplies
    by the scale rounded to the token dtype. An all-zero block (0/0) is zeros.

    Args:
        row: (H,) bfloat16, float16 or float32.

    Returns:
        (H,), dtype of row.

    >>> through_int8_transport(torch.tensor([127.0, 2.5, -0.25], dtype=torch.float16))  # scale 1: to even
    tensor([127.,   2.,   0.], dtype=torch.float16)
    """
    received = torch.empty_like(row)
    for start in range(0, len(row), BLOCK):
        values = row[start : start + BLOCK].float()
        scale = values.abs().max() * torch.tensor(1.0 / 127.0, dtype=torch.float32)
        quotients = (values / scale).to(torch.float16)
        quotients[torch.isnan(quotients)] = 0.0
        levels = torch.round(quotients)
        # true of every bf16 and fp16 row (a scale has ≥ 9 bits even from the least subnormal), not of fp32 subnormals
        assert levels.abs().max() <= 127
        sent_levels, sent_scale = levels.to(torch.int8), scale.to(row.dtype)
        received[start : start + BLOCK] = (sent_levels.float() * sent_scale.float()).to(row.dtype)
    return received


def tp_sum(own: torch.Tensor, peer: torch.Tensor) -> torch.Tensor:
    """The sum of the two TP peers' copies of one row, rounded to their dtype before it is sent on (specification §3.3).

    bf16 is widened to fp32. For fp16 the specification adds directly; via fp32 is the same value, because double
    rounding from 24 bits to 11 is innocuous for a sum (24 ≥ 2·11 + 2).

    Args:
        own, peer: (H,) of one float dtype.

    Returns:
        (H,) of that dtype.

    >>> tp_sum(torch.tensor([1.0, 256.0], dtype=torch.bfloat16), torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
    tensor([  2., 256.], dtype=torch.bfloat16)
    """
    return (own.float() + peer.float()).to(own.dtype)
