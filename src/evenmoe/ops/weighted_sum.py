"""The weighted sum of a token's rows, in float32 unless they are float64: the local half of combine (§3.4).

On a CPU it is one compiled pass: every row is read once, the float32 sums stay in a core's cache. Nothing is fused:
numba compiles without fast-math, so a product is rounded to float32 before it is added.

Shapes: Bs tokens, H hidden, K experts per token, Sn shared experts on ranks of their own, N rows received.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]: documented

from evenmoe.compiled import compiled, compiled_inner
from evenmoe.contract.layout import Layout
from evenmoe.ops.numerics import softmax_of_two, tree_sum
from evenmoe.ops.operator import Combining
from evenmoe.transport.packets import Incoming
from evenmoe.transport.raw_memory import float_of_bits, pointer_to

# Columns at a time: 8 KiB of float32 sums leave room for the rows in a first-level cache of 32 KiB.
WIDTH = 2048
_SHIFT, _HALF, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_NAN = np.uint16(0x7FC0)


@compiled_inner
def _wide(half):
    """A bfloat16, which is the upper half of a float32."""
    return float_of_bits(np.uint32(np.uint32(half) << _SHIFT))


@compiled
def _add_bfloat16(sums, addresses, weights, start):
    """sums[h] += weights[k] · column start + h of the row at addresses[k], for ascending k, where that is not 0.

    Four rows in one pass, so that the sums are read and written a quarter as often.
    """
    width, k, rows = (sums.size,), 0, addresses.size
    while k < rows:
        if k + 4 <= rows and addresses[k] and addresses[k + 1] and addresses[k + 2] and addresses[k + 3]:
            row0 = carray(pointer_to(addresses[k] + 2 * start), width, np.uint16)
            row1 = carray(pointer_to(addresses[k + 1] + 2 * start), width, np.uint16)
            row2 = carray(pointer_to(addresses[k + 2] + 2 * start), width, np.uint16)
            row3 = carray(pointer_to(addresses[k + 3] + 2 * start), width, np.uint16)
            w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
            for h in range(sums.size):
                total = sums[h] + w0 * _wide(row0[h])
                total += w1 * _wide(row1[h])
                total += w2 * _wide(row2[h])
                sums[h] = total + w3 * _wide(row3[h])
            k += 4
            continue
        if addresses[k]:
            row = carray(pointer_to(addresses[k] + 2 * start), width, np.uint16)
            weight = weights[k]
            for h in range(sums.size):
                sums[h] += weight * _wide(row[h])
        k += 1


@compiled
def _add_plain(sums, addresses, weights):
    """As `_add_bfloat16`, of whole rows of the dtype of the sums, float32 or float64."""
    for k in range(addresses.size):
        if addresses[k]:
            row = carray(pointer_to(addresses[k]), (sums.size,), sums.dtype)
            weight = weights[k]
            for h in range(sums.size):
                sums[h] += weight * row[h]


@compiled
def add_bfloat16(total, addresses, weights):
    """total[t] += weights[t, k] · the row at addresses[t, k] for ascending k, where that is not 0.

    `total` float32 (T, H), `addresses` int64 (T, K), of H bfloat16 each, `weights` float32 (T, K).
    """
    for token in range(addresses.shape[0]):
        for start in range(0, total.shape[1], WIDTH):
            sums = total[token, start : min(start + WIDTH, total.shape[1])]
            _add_bfloat16(sums, addresses[token], weights[token], start)


@compiled
def add_plain(total, addresses, weights):
    """As `add_bfloat16`, of rows, sums and weights of one dtype, float32 or float64."""
    for token in range(addresses.shape[0]):
        _add_plain(total[token], addresses[token], weights[token])


@compiled
def sum_bfloat16(out, addresses, weights):
    """out[t] = the sum that `add_bfloat16` adds to zeros, rounded to bfloat16 to nearest even; `out` uint16 (T, H)."""
    bits = np.empty(WIDTH, np.uint32)
    sums = bits.view(np.float32)
    for token in range(addresses.shape[0]):
        for start in range(0, out.shape[1], WIDTH):
            rounded = out[token, start : min(start + WIDTH, out.shape[1])]
            part = sums[: rounded.size]
            part[:] = 0
            _add_bfloat16(part, addresses[token], weights[token], start)
            for h in range(rounded.size):
                value = bits[h]
                up = np.uint32(value + _HALF + (np.uint32(value >> _SHIFT) & _ONE))
                rounded[h] = np.uint16(up >> _SHIFT) if part[h] == part[h] else _NAN


@compiled
def sum_plain(out, addresses, weights):
    """out[t] = the sum that `add_plain` adds to zeros."""
    for token in range(addresses.shape[0]):
        out[token] = 0
        _add_plain(out[token], addresses[token], weights[token])


_NO_NUMBERS = torch.zeros(0, dtype=torch.int32)


def accumulate(layout: Layout, rows: torch.Tensor | Incoming, position: torch.Tensor, call: Combining) -> torch.Tensor:
    """§3.4 up to the final rounding: weighted rows in ascending k, then shared experts, then shared_expert_x.

    Each product is rounded to float32 before it is added; assignments without a row, at position −1, add nothing.

    Returns:
        float32 (Bs, H) sums, of which those of active tokens count.
    """
    num_tokens, top_k = layout.num_tokens, layout.top_k
    total = torch.zeros((num_tokens, layout.hidden), dtype=torch.float32, device=call.expert_scales.device)
    weights = _weights(layout, call)
    if call.virtual_experts:  # their terms stand between those of the rows, by k
        for k in range(top_k):
            add_rows(total, rows, position[:, k : k + 1], weights[:, k : k + 1])
            _add_virtual(total, k, layout, call)
        position, weights = position[:, top_k:], weights[:, top_k:]
    add_rows(total, rows, position, weights)
    if call.shared_expert_x is not None:
        total += call.shared_expert_x.reshape(num_tokens, layout.hidden).float()
    return total


def rounded_sums(
    layout: Layout, rows: torch.Tensor | Incoming, position: torch.Tensor, call: Combining
) -> torch.Tensor:
    """What `accumulate` returns, rounded to the dtype of the rows; in one pass where there is nothing but rows."""
    if call.virtual_experts or call.shared_expert_x is not None:
        return accumulate(layout, rows, position, call).to(call.expand_x.dtype)
    return sum_rows(rows, position, _weights(layout, call))


def _weights(layout: Layout, call: Combining) -> torch.Tensor:
    """float32 (Bs, K + Sn), those of shared experts are 1."""
    if not layout.shared_experts:
        return call.expert_scales.float()
    ones = call.expert_scales.new_ones((layout.num_tokens, layout.shared_experts))
    return torch.cat([call.expert_scales.float(), ones], dim=1)


def sum_dtype(rows: torch.dtype) -> torch.dtype:
    """The dtype in which rows are weighted and added up: float64 for float64, float32 for all others."""
    return torch.float64 if rows == torch.float64 else torch.float32


def add_rows(total: torch.Tensor, rows: torch.Tensor | Incoming, position: torch.Tensor, weights: torch.Tensor) -> None:
    """total[t] += weights[t, k] · rows[position[t, k]] for ascending k, each product rounded before it is added.

    Args:
        total: (T, H) of `sum_dtype` of the rows, contiguous, changed in place.
        rows: (N, H) of any float dtype; or what was received, which is read where it lies.
        position: int64 (T, K), −1 where there is no row.
        weights: (T, K), dtype of `total`; what they hold where there is no row does not matter.
    """
    like = rows if isinstance(rows, torch.Tensor) else rows.like
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, total.dtype):
        assert weights.shape == position.shape, (weights.shape, position.shape)
        add, incoming = add_bfloat16 if like.dtype == torch.bfloat16 else add_plain, _in_place(rows)
        add(total.numpy(), _addresses(incoming, position), weights.contiguous().numpy())
        return
    if not isinstance(rows, torch.Tensor):
        rows = rows.take()
    for tokens in chunks(len(total), max(total.shape[1], 1), rows.device):
        part = total[tokens]
        for k in range(position.shape[1]):
            where = (position[tokens, k] >= 0).nonzero().flatten()
            if where.numel():
                term = rows.index_select(0, position[tokens, k][where]).to(total.dtype)
                part[where] += term.mul_(weights[tokens, k][where, None])


def sum_rows(
    rows: torch.Tensor | Incoming, position: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, H), the sums that `add_rows` adds to zeros, rounded to the dtype of the rows.

    Args:
        rows, position, weights: as in `add_rows`; weights of `sum_dtype` of the rows.
        out: contiguous (T, H), dtype of the rows, where the sums are written. None for new memory.
    """
    like = rows if isinstance(rows, torch.Tensor) else rows.like
    shape = position.shape[0], like.shape[1]
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, weights.dtype):
        y = like.new_empty(shape) if out is None else out
        bits, add = (y.view(torch.uint16), sum_bfloat16) if like.dtype == torch.bfloat16 else (y, sum_plain)
        assert weights.shape == position.shape, (weights.shape, position.shape)
        incoming = _in_place(rows)
        add(bits.numpy(), _addresses(incoming, position), weights.contiguous().numpy())
        return y
    total = torch.zeros(shape, dtype=weights.dtype, device=like.device)
    add_rows(total, rows, position, weights)
    return total.to(like.dtype) if out is None else out.copy_(total)


def _in_place(rows: torch.Tensor | Incoming) -> Incoming:
    """Rows that lie one behind the other, where they do; whoever reads them by address holds what this returns."""
    if not isinstance(rows, torch.Tensor):
        return rows
    rows = rows.contiguous()
    return Incoming(rows, np.array([len(rows)]), torch.arange(len(rows)), _NO_NUMBERS)


def _addresses(incoming: Incoming, position: torch.Tensor) -> np.ndarray:
    """int64 (T, K), where each row lies in the memory of this process, 0 where there is none."""
    return incoming.addresses(position).reshape(position.shape)


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
