"""Arithmetic that every device and the reference do alike, bit for bit: sums in a fixed order, and int8 rows.

Rows travel as int8 with a scale per row in dispatch (quant_mode 2, §2.8), per block of eight in combine (§3.5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DYNAMIC_INT8 = 2  # quant_mode of §2.8
BLOCK_INT8 = 2  # comm_quant_mode of §3.5
BLOCK = 8  # consecutive elements that share one scale in combine (§3.5)


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum float32 values over the last axis, adding the upper half to the lower half until one is left.

    The hardware reduces in a tree whose shape is not published (§4), so evenmoe fixes one: pad with +0 to a power of
    two, halve. Elementwise additions alone, hence the same bits on every device.

    >>> tree_sum(torch.tensor([1.0, 2.0, 3.0])).item()
    6.0
    """
    length = values.shape[-1]
    width = 1 << max(length - 1, 0).bit_length()
    values = torch.nn.functional.pad(values, (0, width - length))
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width:]
    return values[..., 0]


def softmax_of_two(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Max-subtracted softmax of two float32 logits; exp in float64, rounded once, so that libraries cannot differ.

    Two exponentials that differ in the last of 53 bits round to different float32 once in about 2^28 cases.

    >>> [p.item() for p in softmax_of_two(torch.tensor([0.0]), torch.tensor([0.0]))]
    [0.5, 0.5]
    """
    largest = torch.maximum(first, second)
    one, two = (_in_float64(torch.exp, logit - largest) for logit in (first, second))
    total = one + two
    return one / total, two / total


def reciprocal_sqrt(values: torch.Tensor) -> torch.Tensor:
    """1/√ of float32 values: the root correctly rounded, then one division (§4).

    The root goes through float64, since torch's float32 root comes from MKL on some CPUs and is one bit off for a sixth
    of its arguments; a float64 root rounded to float32 is the correct one (53 ≥ 2·24 + 2 bits).

    >>> reciprocal_sqrt(torch.tensor([6.25])).item()
    0.4000000059604645
    """
    root = _in_float64(torch.sqrt, values)
    return torch.ones_like(root) / root


def _in_float64(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """`function` in float64, rounded to float32; one value per token, so Apple's GPUs, without float64, ask the CPU."""
    device = "cpu" if values.device.type == "mps" else values.device
    return function(values.to(device).double()).float().to(values.device)


def quantize_rows(rows: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token dynamic int8 (§2.8): scale each row so that its largest element becomes 127.

    Args:
        rows: (N, H), any float dtype.
        smooth: float32 (N, H) factors that multiply the rows first, or None.

    Returns:
        int8 (N, H) and float32 (N,) scales; value ≈ int8 · scale. Where v·d is not finite (an all-zero row: 0 · inf)
        the int8 is 0.

    >>> quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]), None)
    (tensor([[  64, -127,   32],
            [   0,    0,    0]], dtype=torch.int8), tensor([0.0157, 0.0000]))
    """
    values = rows.float()
    if smooth is not None:
        values = values * smooth
    # amax of no elements is an error, and a rank may have no rows.
    largest = values.abs().amax(dim=1) if rows.numel() else values.new_zeros(rows.shape[0])
    factor = torch.full_like(largest, 127.0) / largest
    scaled = values * factor[:, None]
    quantized = torch.where(scaled.isfinite(), scaled.round(), 0.0).to(torch.int8)
    return quantized, torch.ones_like(factor) / factor


def pack_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Int8 by blocks of eight with a scale in the rows' dtype, as bytes (N, H + ceil(H/8)·itemsize) (§3.5)."""
    count, hidden = rows.shape
    blocks = torch.nn.functional.pad(rows.float(), (0, -hidden % BLOCK)).view(count, -(-hidden // BLOCK), BLOCK)
    scale = blocks.abs().amax(dim=2) * torch.tensor(1 / 127, dtype=torch.float32)
    quotient = blocks / scale[:, :, None]  # by the scale before it is rounded; an all-zero block gives 0/0
    # The chip rounds the quotient to fp16 first and to an integer second.
    quotient = torch.where(quotient.isfinite(), quotient, 0.0)
    quantized = quotient.half().round().to(torch.int8).flatten(1)[:, :hidden]
    sent_scale = scale.to(rows.dtype)
    return torch.cat([quantized.view(torch.uint8), reinterpret(sent_scale, torch.uint8)], dim=1)


def unpack_blocks(packed: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows that `pack_blocks` sent: int8 times the rounded scale, rounded to `dtype`."""
    quantized = packed[:, :hidden].view(torch.int8).float()
    scale = reinterpret(packed[:, hidden:], dtype).float()
    return (quantized * scale.repeat_interleave(BLOCK, dim=1)[:, :hidden]).to(dtype)


def reinterpret(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `values` as another dtype; a copy, since torch wants their strides and offset to fit."""
    return values.clone(memory_format=torch.contiguous_format).view(dtype)
