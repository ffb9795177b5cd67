"""The weighted sum of a token's rows, in float32 unless they are float64: the local half of combine (§3.4).

On a CPU it is one compiled pass: every row is read once, the float32 sums stay in a core's cache. Nothing is fused:
numba compiles without fast-math, so a product is rounded to float32 before it is added.

Shapes: Bs tokens, H hidden, K experts per token, Sn shared experts on ranks of their own, N rows received.
"""

from __future__ import annotations

import numpy as np
import torch

from evenmoe.compiled import compiled
from evenmoe.contract.layout import Layout
from evenmoe.ops.numerics import softmax_of_two, tree_sum
from evenmoe.ops.operator import Combining

# Columns at a time: two float32 buffers of 8 KiB leave room for the rows in a first-level cache of 32 KiB.
WIDTH = 2048


@compiled
def add_bfloat16(total, rows, position, weights):
    """total[t] += weights[t, k] · rows[position[t, k]] for ascending k, where position is not −1.

    `total` float32 (T, H), `rows` uint16 (N, H), the bits of bfloat16, `position` int64 (T, K), `weights` float32
    (T, K).
    """
    hidden = total.shape[1]
    bits = np.empty(WIDTH, np.uint32)
    values = bits.view(np.float32)
    for token in range(position.shape[0]):
        for start in range(0, hidden, WIDTH):
            part = total[token, start : min(start + WIDTH, hidden)]
            for k in range(position.shape[1]):
                if position[token, k] < 0:
                    continue
                row = rows[position[token, k], start : start + part.size]
                weight = weights[token, k]
                for h in range(part.size):
                    bits[h] = np.uint32(row[h]) << np.uint32(16)  # a bfloat16 is the upper half of a float32
                for h in range(part.size):
                    part[h] += weight * values[h]


@compiled
def add_plain(total, rows, position, weights):
    """As `add_bfloat16`, of rows, sums and weights of one dtype, float32 or float64."""
    for token in range(position.shape[0]):
        part = total[token]
        for k in range(position.shape[1]):
            if position[token, k] < 0:
                continue
            row = rows[position[token, k]]
            weight = weights[token, k]
            for h in range(part.size):
                part[h] += weight * row[h]


def accumulate(layout: Layout, rows: torch.Tensor, position: torch.Tensor, call: Combining) -> torch.Tensor:
    """§3.4 up to the final rounding: weighted rows in ascending k, then shared experts, then shared_expert_x.

    Each product is rounded to float32 before it is added; assignments without a row, at position −1, add nothing.

    Returns:
        float32 (Bs, H) sums, of which those of active tokens count.
    """
    scales, num_tokens, top_k = call.expert_scales, layout.num_tokens, layout.top_k
    total = torch.zeros((num_tokens, layout.hidden), dtype=torch.float32, device=rows.device)
    weights = torch.cat([scales.float(), scales.new_ones((num_tokens, layout.shared_experts))], dim=1)
    if call.virtual_experts:  # their terms stand between those of the rows, by k
        for k in range(top_k):
            add_rows(total, rows, position[:, k : k + 1], weights[:, k : k + 1])
            _add_virtual(total, k, layout, call)
        position, weights = position[:, top_k:], weights[:, top_k:]
    add_rows(total, rows, position, weights)
    if call.shared_expert_x is not None:
        total += call.shared_expert_x.reshape(num_tokens, layout.hidden).float()
    return total


def sum_dtype(rows: torch.dtype) -> torch.dtype:
    """The dtype in which rows are weighted and added up: float64 for float64, float32 for all others."""
    return torch.float64 if rows == torch.float64 else torch.float32


def add_rows(total: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor) -> None:
    """total[t] += weights[t, k] · rows[position[t, k]] for ascending k, each product rounded before it is added.

    Args:
        total: (T, H) of `sum_dtype` of the rows, contiguous, changed in place.
        rows: (N, H) of any float dtype.
        position: int64 (T, K), −1 where there is no row.
        weights: (T, K), dtype of `total`; what they hold where there is no row does not matter.
    """
    if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, total.dtype):
        rows, position, weights = rows.contiguous(), position.contiguous(), weights.contiguous()
        add = add_plain
        if rows.dtype == torch.bfloat16:
            rows, add = rows.view(torch.uint16), add_bfloat16
        add(total.numpy(), rows.numpy(), position.numpy(), weights.numpy())
        return
    for tokens in chunks(len(total), max(total.shape[1], 1), rows.device):
        part = total[tokens]
        for k in range(position.shape[1]):
            where = (position[tokens, k] >= 0).nonzero().flatten()
            if where.numel():
                term = rows.index_select(0, position[tokens, k][where]).to(total.dtype)
                part[where] += term.mul_(weights[tokens, k][where, None])


def chunks(num_tokens: int, hidden: int, device: torch.device) -> list[slice]:
    """On a CPU, so few tokens at a time that their float32 rows stay in a core's cache (256 KiB); else all at once."""
    size = max(1, (1 << 16) // hidden) if device.type == "cpu" else max(1, num_tokens)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _add_virtual(total: torch.Tensor, k: int, layout: Layout, call: Combining) -> None:
    """Copy and const experts, computed where the token lives (§2.10, §3.4); zero experts add nothing."""
    ids = call.expert_ids[:, k].long() - layout.num_experts - call.zero_expert_num
    mask, weights = call.x_active_mask, call.expert_scales[:, k, None]
    if mask is not None and mask.dim() == 2:
        ids = torch.where(mask[:, k], ids, -1)
    where = ((ids >= 0) & (ids < call.copy_expert_num)).nonzero().flatten()
    if where.numel():
        assert call.ori_x is not None
        total[where] += weights[where] * call.ori_x[where].float()
    where = (ids >= call.copy_expert_num).nonzero().flatten()
    if where.numel():
        assert call.ori_x is not None
        assert call.const_expert_alpha_1 is not None
        assert call.const_expert_alpha_2 is not None
        assert call.const_expert_v is not None
        which = ids[where] - call.copy_expert_num
        x = call.ori_x[where].float()
        p1, p2 = call.const_expert_alpha_1[which].float(), call.const_expert_alpha_2[which].float()
        if p1.dim() == 2:
            p1, p2 = softmax_of_two(tree_sum(p1 * x), tree_sum(p2 * x))
        mixed = p1[:, None] * x + p2[:, None] * call.const_expert_v[which].float()
        total[where] += weights[where] * mixed
