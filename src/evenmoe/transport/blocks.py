"""Packets of rows to all ranks as blocks of one buffer, for groups whose ranks cannot read each other's memory.

A block is rows of one rank for another: a head with the exchange's number and the block's length, then int32 numbers,
both in as many whole rows as they need, then the rows themselves. So they travel together, and a receiver sees at once
what is not what it waits for.

Shapes: W ranks, N rows, M numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from evenmoe.transport import agreement

HEAD_WORDS, _TEXT = 32, 3  # number of the exchange, rows of the block, status; the text of a failure
HEAD_BYTES = 8 * HEAD_WORDS
_Memory: TypeAlias = Any  # an array where that is possible, else a tensor: they are sliced and filled alike


class Blocks:
    """How the blocks of all ranks lie in a buffer, one after the other: W of each.

    Args:
        numbers, rows: int32 numbers and rows of every block.
        row_bytes: bytes of one row.

    Attributes:
        lengths: rows of the whole block. starts, first: where it begins, and its first row of all. total: of all.
    """

    def __init__(self, numbers: Sequence[int], rows: Sequence[int], row_bytes: int) -> None:
        self.numbers, self.rows, self.row_bytes, self.total = numbers, list(rows), row_bytes, 0
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.first: list[int] = []
        for num_numbers, num_rows in zip(numbers, rows, strict=True):
            head = -(-(HEAD_BYTES + 4 * num_numbers) // row_bytes)
            self.starts.append(self.total)
            self.first.append(self.total + head)
            self.lengths.append(head + num_rows)
            self.total += head + num_rows

    def positions(self) -> torch.Tensor:
        """int64 (N,), where every row lies in the buffer, by rank."""
        rows = np.array(self.rows)
        shift = np.repeat(np.array(self.first) - (rows.cumsum() - rows), rows)
        return torch.from_numpy(np.arange(len(shift)) + shift)


def heads_for(blocks: Blocks, number: int, error: BaseException | None = None) -> agreement.Words:
    """int64 (W, HEAD_WORDS), what stands in front of every block of exchange `number`; `error` if the call failed."""
    heads = np.zeros((len(blocks.rows), HEAD_WORDS), np.int64)
    heads[:, 0], heads[:, 1] = number, blocks.lengths
    if error is not None:
        heads[:, 2] = getattr(error, "status", agreement.FAILED)
        heads[:, _TEXT:] = agreement.text_words(error, HEAD_WORDS - _TEXT)
    return heads


def failure_in(heads: agreement.Words) -> tuple[int, str, bool] | None:
    """The first rank whose head says that its call failed, what it says, and whether it was invalid; None if none."""
    failed = np.flatnonzero(heads[:, 2])
    if not len(failed):
        return None
    rank = int(failed[0])
    return rank, agreement.text_of(heads[rank, _TEXT:]), bool(heads[rank, 2] != agreement.FAILED)


def fill(
    buffer: torch.Tensor,
    blocks: Blocks,
    heads: agreement.Words,
    rows: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> None:
    """Write the blocks for all ranks into `buffer` (blocks.total, …); without rows, their heads alone.

    Args:
        rows: (any, …). index: integers (N,), which of them, by rank. numbers: int32 (M,), by rank.
    """
    if rows is not None and len(rows):
        assert index is not None
        whole = torch.zeros(blocks.total, dtype=index.dtype, device=index.device)
        into: _Memory = whole
        which: _Memory = index
        if index.device.type == "cpu":  # slices of arrays cost a third of those of tensors
            into, which = whole.numpy(), index.numpy()
        taken = 0
        for first, count in zip(blocks.first, blocks.rows, strict=True):
            into[first : first + count] = which[taken : taken + count]
            taken += count
        torch.index_select(rows, 0, whole, out=buffer)
    memory = _bytes(buffer)
    octets: _Memory = heads.view(np.uint8)
    octets = octets if isinstance(memory, np.ndarray) else torch.from_numpy(octets).to(memory.device)
    ours = None if numbers is None else _bytes(numbers.contiguous())
    taken = 0
    for rank, (start, count) in enumerate(zip(blocks.starts, blocks.numbers, strict=True)):
        at = start * blocks.row_bytes
        memory[at : at + HEAD_BYTES] = octets[rank]
        if ours is not None:
            at += HEAD_BYTES
            memory[at : at + 4 * count] = ours[4 * taken : 4 * (taken + count)]
            taken += count


def heads_and_numbers(buffer: torch.Tensor, blocks: Blocks) -> tuple[agreement.Words, torch.Tensor]:
    """The heads, int64 (W, HEAD_WORDS), and the numbers, int32 (M,), of blocks that have come."""
    memory = _bytes(buffer)
    heads, numbers = [], []
    for start, count in zip(blocks.starts, blocks.numbers, strict=True):
        at = start * blocks.row_bytes + HEAD_BYTES
        heads.append(memory[at - HEAD_BYTES : at])
        numbers.append(memory[at : at + 4 * count])
    both, size = _joined(heads + numbers), HEAD_BYTES * len(heads)
    return both[:size].view(torch.int64).cpu().numpy().reshape(-1, HEAD_WORDS), both[size:].view(torch.int32)


def _bytes(tensor: torch.Tensor) -> _Memory:
    """The memory of a contiguous tensor as bytes; as an array where that is possible, since its slices cost less."""
    octets = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return octets.numpy() if octets.device.type == "cpu" else octets


def _joined(parts: list[_Memory]) -> torch.Tensor:
    """Pieces of bytes, one after the other, in new memory."""
    return torch.from_numpy(np.concatenate(parts)) if isinstance(parts[0], np.ndarray) else torch.cat(parts)
