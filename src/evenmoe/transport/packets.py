"""What a rank sends in one call, and what it was sent: rows in one buffer, or where the ranks that sent them keep them.

Shapes: W ranks, N rows that were sent here, M numbers that were sent along.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.compiled import compiled
from evenmoe.transport.raw_memory import copy_bytes
from evenmoe.transport.segment import Octets

Words = npt.NDArray[np.int64]


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


def row_bytes(shape: tuple[int, ...], like: torch.Tensor) -> int:
    """The bytes of one of the rows of a tensor of `shape` and the dtype of `like`."""
    return prod(shape[1:]) * like.element_size()


@dataclass(frozen=True)
class Incoming:
    """What a rank was sent; the rows are valid until the call ends (`together`).

    Attributes:
        like: the rows in one buffer, (any, …); or, with `base`, any tensor of their dtype and shape.
        rows: int64 (W,), how many each rank sent.
        at: int64 (N,), which of the rows in the buffer, or of those that its source shows, each one is, by source, in
            the order in which they were sent.
        numbers: int32 (M,), likewise.
        base: int64 (W,), the address of the first row that each source shows; None for a buffer.
    """

    like: torch.Tensor
    rows: Words
    at: torch.Tensor
    numbers: torch.Tensor
    base: Words | None = None

    @cached_property
    def first(self) -> Words:
        """W positions among the N rows, of the first from every source."""
        return self.rows.cumsum() - self.rows

    def take(self, which: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy rows.

        Args:
            which: int64 (n,), positions among the N rows. None for all, in their order.
            out: contiguous (n, row), where they are written. None for new memory.
        """
        if self.like.device.type != "cpu":
            return torch.index_select(self.like, 0, self.at if which is None else self.at[which], out=out)
        addresses = self.addresses(which)
        shape = (len(addresses), *self.like.shape[1:])
        out = self.like.new_empty(shape) if out is None else out
        assert (out.shape, out.dtype) == (shape, self.like.dtype), (out.shape, shape)
        assert out.is_contiguous()
        gather(out.data_ptr(), addresses, row_bytes(self.like.shape, self.like))
        return out

    def addresses(self, which: torch.Tensor | None = None) -> np.ndarray:
        """int64 (n,), where rows lie in the memory of this process, on the CPU; 0 for the position −1.

        Args:
            which: integers (n,), positions among the N rows. None for all, in their order.
        """
        base = np.full(1, self.like.data_ptr()) if self.base is None else self.base
        every = np.empty(self.at.shape[0], np.int64)
        find_rows(self.at.numpy(), self.rows, base, row_bytes(self.like.shape, self.like), every)
        if which is None:
            return every
        chosen = np.empty(which.numel(), np.int64)
        choose(every, which.numpy().reshape(-1), chosen)
        return chosen


@dataclass(frozen=True)
class Views:
    """What the ranks of a group show and send to this one, by the address where it lies in this process.

    All int64 (W,); 0 for ranks that do not take part.

    Attributes:
        rows: addresses of the first row of every rank. counts: how many rows it shows; 0 where they have other bytes
            than this rank's.
        messages: addresses of the messages. lengths: their bytes.
        held: what lives as long as this, if what is shown would not otherwise.
    """

    rows: Words
    counts: Words
    messages: Words
    lengths: Words
    held: object = None

    def rows_of(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """A copy of the rows that a rank shows, (N, …), of the dtype and shape of those of `like`, (any, …)."""
        rows = like.new_empty((int(self.counts[rank]), *like.shape[1:]))
        if rows.numel():
            ctypes.memmove(rows.data_ptr(), int(self.rows[rank]), rows.numel() * rows.element_size())
        return rows

    def message_of(self, rank: int) -> Octets:
        """A copy of the message of a rank, uint8 (n,)."""
        return np.frombuffer(ctypes.string_at(int(self.messages[rank]), int(self.lengths[rank])), np.uint8)


@compiled
def find_rows(at, rows, base, row_bytes, addresses):
    """Addresses of rows `at` those of their sources, int64 (N,); `base` one for all sources, or one for each."""
    if rows.sum() != at.size or addresses.size != at.size:
        raise IndexError("other numbers of rows than there are")
    row = 0
    for source in range(rows.size):
        first = base[min(source, base.size - 1)]
        for _ in range(rows[source]):
            addresses[row] = first + at[row] * row_bytes
            row += 1


@compiled
def choose(addresses, which, chosen):
    """chosen[i] = addresses[which[i]], 0 for −1."""
    for i in range(which.size):
        if not -1 <= which[i] < addresses.size:
            raise IndexError("a row that has not come")
        chosen[i] = addresses[which[i]] if which[i] >= 0 else 0


@compiled
def copy_memory(to, source, size):
    """Copy `size` bytes between addresses, without the interpreter's lock."""
    copy_bytes(to, source, size)


@compiled
def gather(out, addresses, width):
    """Copy `width` bytes from each of `addresses`, int64 (n,), to the address `out`, one behind the other."""
    for row in range(len(addresses)):
        copy_bytes(out + row * width, addresses[row], width)
