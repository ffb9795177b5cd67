"""Int8 on the wire: per row in dispatch (quant_mode 2, §2.8), per block of eight in combine (§3.5)."""

from __future__ import annotations

import torch

BLOCK = 8  # consecutive elements that share one scale in combine (§3.5)


def quantise_rows(rows: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token dynamic int8 (§2.8): scale each row so that its largest element becomes 127.

    Args:
        rows: (N, H), any float dtype.
        smooth: float32 (N, H) factors that multiply the rows first, or None.

    Returns:
        int8 (N, H) and float32 (N,) scales; value ≈ int8 · scale. Where v·d is not finite (an all-zero row: 0 · inf)
        the int8 is 0.

    >>> quantise_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]), None)
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
    quantised = torch.where(scaled.isfinite(), scaled.round(), 0.0).to(torch.int8)
    return quantised, torch.ones_like(factor) / factor


def pack_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Int8 by blocks of eight with a scale in the rows' dtype, as bytes (N, H + ceil(H/8)·itemsize) (§3.5)."""
    count, hidden = rows.shape
    blocks = torch.nn.functional.pad(rows.float(), (0, -hidden % BLOCK)).view(count, -(-hidden // BLOCK), BLOCK)
    scale = blocks.abs().amax(dim=2) * torch.tensor(1 / 127, dtype=torch.float32)
    quotient = blocks / scale[:, :, None]  # by the scale before it is rounded; an all-zero block gives 0/0
    # The chip rounds the quotient to fp16 first and to an integer second.
    quotient = torch.where(quotient.isfinite(), quotient, 0.0)
    quantised = quotient.half().round().to(torch.int8).flatten(1)[:, :hidden]
    sent_scale = scale.to(rows.dtype)
    return torch.cat([quantised.view(torch.uint8), reinterpret(sent_scale, torch.uint8)], dim=1)


def unpack_blocks(packed: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows that `pack_blocks` sent: int8 times the rounded scale, rounded to `dtype`."""
    quantised = packed[:, :hidden].view(torch.int8).float()
    scale = reinterpret(packed[:, hidden:], dtype).float()
    return (quantised * scale.repeat_interleave(BLOCK, dim=1)[:, :hidden]).to(dtype)


def reinterpret(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `values` as another dtype; a copy, since torch wants their strides and offset to fit."""
    return values.clone(memory_format=torch.contiguous_format).view(dtype)
