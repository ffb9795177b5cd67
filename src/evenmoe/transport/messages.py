"""What a rank tells each other one where they read each other's memory: a header, counts, and which rows are for it.

A message is a header's words; three words that say how many counts, rows and numbers follow; the counts, int64; the
index of every row among those that the rank shows, int64; the numbers, int32, the last word filled up. So a rank that
has failed sends the header alone, and whatever the others wait for, they can read it.

Shapes: W ranks, n counts for each rank, R rows and M numbers for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled
from evenmoe.transport.agreement import HEADER, Words
from evenmoe.transport.raw_memory import copy_bytes
from evenmoe.transport.segment import Octets

_SIZES = HEADER + 3  # words in front of the counts
NO_ROWS = np.zeros(0, np.int64)
NO_NUMBERS = np.zeros(0, np.int32)
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Told:
    """What all ranks have told this one, once their headers are known to agree.

    Attributes:
        counts: int64 (W, n). rows: int64 (W,), numbers of rows.
        at: int64 (R,), where among the rows that its source shows each one lies. numbers: int32 (M,). Both by source.
    """

    counts: Words
    rows: Words
    at: Words
    numbers: Numbers


def pack(
    header: Words,
    counts: Words,
    index: Words = NO_ROWS,
    rows: Sequence[int] = (),
    numbers: Numbers = NO_NUMBERS,
    along: Sequence[int] = (),
    shown: int = 0,
) -> tuple[Octets, Words]:
    """The messages for all ranks, one behind the other, and the bytes of each, int64 (W,).

    Args:
        header: int64 (HEADER,). counts: int64 (W, n), row d for rank d.
        index: integers (R,), which of the rows that this rank shows, by rank; `rows` of them for each, or none at all.
        numbers: int32 (M,), likewise, of `along`.
        shown: how many rows this rank shows, which the others read by their addresses.

    Raises:
        IndexError: an index of no row.
    """
    each = np.zeros((2, len(counts)), np.int64)
    if len(rows):
        each[0], each[1] = rows, along
    lengths, counts, index = np.empty(len(counts), np.int64), np.ascontiguousarray(counts), np.ascontiguousarray(index)
    message = np.empty(_measure(counts, index, each, numbers, shown, lengths), np.uint8)
    _pack(header, counts, index, each, numbers, lengths, message.view(np.int64))
    return message, lengths


@dataclass(frozen=True)
class Opened:
    """Messages from all ranks whose headers have been read, and nothing behind them yet.

    Attributes:
        headers: int64 (W, HEADER). differ: whether one of them is another than this rank's.
    """

    headers: Words
    differ: bool
    sizes: Words
    addresses: Words

    def unpack(self) -> Told:
        """What follows the headers, once these are known to agree: each of as many counts."""
        rows = np.empty(len(self.sizes), np.int64)
        num_rows, num_numbers = _sizes(self.sizes, rows)
        counts, at = np.empty((len(rows), self.sizes[0, 0]), np.int64), np.empty(num_rows, np.int64)
        numbers = np.empty(num_numbers, np.int32)
        _unpack(self.addresses, self.sizes, counts, at, numbers)
        return Told(counts, rows, at, numbers)


def open_messages(addresses: Words, own: Words) -> Opened:
    """Read the headers of messages, one from every rank, and compare them with this rank's own.

    Args:
        addresses: int64 (W,), of the messages, which live as long as what is returned. own: int64 (HEADER,).
    """
    headers, sizes = np.empty((len(addresses), HEADER), np.int64), np.empty((len(addresses), 3), np.int64)
    return Opened(headers, _open(addresses, own, headers, sizes), sizes, addresses)


@compiled
def _measure(counts, index, each, numbers, shown, lengths):
    world_size, width = counts.shape
    rows, along = each
    if rows.sum() != index.size or along.sum() != numbers.size:
        raise IndexError("other numbers of rows than there are")
    for row in index:
        if not 0 <= row < shown:
            raise IndexError("a row that is not shown")
    total = 0
    for rank in range(world_size):
        lengths[rank] = 8 * (_SIZES + width + rows[rank] + (along[rank] + 1) // 2)
        total += lengths[rank]
    return total


@compiled
def _pack(header, counts, index, each, numbers, lengths, words):
    world_size, width = counts.shape
    rows, along = each
    into = row = number = 0
    for rank in range(world_size):
        at, into = into, into + lengths[rank] // 8
        for i in range(HEADER):
            words[at + i] = header[i]
        at += HEADER
        words[at], words[at + 1], words[at + 2] = width, rows[rank], along[rank]
        at += 3
        for i in range(width):
            words[at + i] = counts[rank, i]
        at += width
        for i in range(rows[rank]):
            words[at + i] = index[row + i]
        at += rows[rank]
        copy_bytes(words.ctypes.data + 8 * at, numbers.ctypes.data + 4 * number, 4 * along[rank])
        row, number = row + rows[rank], number + along[rank]


@compiled
def _open(addresses, own, headers, sizes):
    differ = False
    for rank in range(addresses.size):
        copy_bytes(headers[rank].ctypes.data, addresses[rank], 8 * HEADER)
        copy_bytes(sizes[rank].ctypes.data, addresses[rank] + 8 * HEADER, 24)
        for i in range(HEADER):
            differ |= headers[rank, i] != own[i]
    return differ


@compiled
def _sizes(sizes, rows):
    num_rows = num_numbers = 0
    for rank in range(rows.size):
        rows[rank] = sizes[rank, 1]
        num_rows, num_numbers = num_rows + sizes[rank, 1], num_numbers + sizes[rank, 2]
    return num_rows, num_numbers


@compiled
def _unpack(addresses, sizes, counts, at, numbers):
    row, number = at.ctypes.data, numbers.ctypes.data
    for rank in range(addresses.size):
        source = addresses[rank] + 8 * _SIZES
        copy_bytes(counts[rank].ctypes.data, source, 8 * counts.shape[1])
        source += 8 * sizes[rank, 0]
        copy_bytes(row, source, 8 * sizes[rank, 1])
        row, source = row + 8 * sizes[rank, 1], source + 8 * sizes[rank, 1]
        copy_bytes(number, source, 4 * sizes[rank, 2])
        number += 4 * sizes[rank, 2]
