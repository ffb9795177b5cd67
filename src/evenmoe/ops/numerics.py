"""Sums whose order is fixed, so that every device and the reference agree bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
