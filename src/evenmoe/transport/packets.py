"""What a rank sends in one call, and what it was sent: rows in one buffer, or where the ranks that sent them keep them.

Shapes: W ranks, N rows that were sent here, M numbers that were sent along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from evenmoe.compiled import compiled
from evenmoe.transport.raw_memory import copy_bytes


@dataclass(frozen=True)
class Outgoing:
    """What a rank is going to send to every rank.

    Attributes:
        numbers, rows: int32 numbers and rows for every destination, W each.
        shape: of one row. like: a tensor of its dtype and device.
    """

    numbers: Sequence[int]
    rows: Sequence[int]
    shape: tuple[int, ...]
    like: torch.Tensor


@dataclass(frozen=True)
class Incoming:
    """What a rank was sent; the rows are valid until the call ends (`together`).

    Attributes:
        parts: where the rows lie: one tensor (…, row) for all ranks, or one for each of them.
        rows: W row counts.
        at: int64 (N,), where in its part every row lies, by source, in the order in which they were sent.
        numbers: int32 (M,), likewise.
    """

    parts: Sequence[torch.Tensor]
    rows: list[int]
    at: torch.Tensor
    numbers: torch.Tensor

    @cached_property
    def first(self) -> list[int]:
        """W positions among the N rows, of the first from every source."""
        return [sum(self.rows[:source]) for source in range(len(self.rows))]

    def take(self, which: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy rows.

        Args:
            which: int64 (n,), positions among the N rows. None for all, in their order.
            out: contiguous (n, row), where they are written. None for new memory.
        """
        like = self.parts[0]
        if len(self.parts) == 1:
            return torch.index_select(like, 0, self.at if which is None else self.at[which], out=out)
        addresses = self.addresses() if which is None else self.addresses()[which.numpy()]
        shape = (len(addresses), *like.shape[1:])
        out = like.new_empty(shape) if out is None else out
        assert (out.shape, out.dtype) == (shape, like.dtype), (out.shape, shape)
        assert out.is_contiguous()
        gather(out.data_ptr(), addresses, prod(like.shape[1:]) * like.element_size())
        return out

    def addresses(self) -> np.ndarray:
        """int64 (N,), where every row lies in the memory of this process; on the CPU."""
        like, at = self.parts[0], self.at.numpy()
        each = prod(like.shape[1:]) * like.element_size()
        base = np.array([part.data_ptr() for part in self.parts])
        return at * each + (base[0] if len(base) == 1 else np.repeat(base, self.rows))


@compiled
def gather(out, addresses, width):
    """Copy `width` bytes from each of `addresses`, int64 (n,), to the address `out`, one behind the other."""
    for row in range(len(addresses)):
        copy_bytes(out + row * width, addresses[row], width)
