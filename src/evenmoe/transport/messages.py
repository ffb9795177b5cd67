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


@dataclass(frozen=True)
class Told:
    """What all ranks have told this one, once their headers are known to agree.

    Attributes:
        counts: int64 (W, n). rows: W numbers of rows.
        at: int64 (R,), where among the rows that its source shows each one lies. numbers: int32 (M,). Both by source.
    """

    counts: Words
    rows: list[int]
    at: Words
    numbers: npt.NDArray[np.int32]


def pack(
    header: Words,
    counts: Words,
    index: Words = NO_ROWS,
    rows: Sequence[int] | None = None,
    numbers: npt.NDArray[np.int32] = NO_NUMBERS,
    along: Sequence[int] | None = None,
) -> tuple[Octets, Words]:
    """The messages for all ranks, one behind the other, and the bytes of each, int64 (W,).

    Args:
        header: int64 (HEADER,). counts: int64 (W, n), row d for rank d.
        index: int64 (R,), by rank, of which `rows` are for each. numbers: int32 (M,), likewise, of `along`.
    """
    sizes = np.zeros((len(counts), 3), np.int64)
    sizes[:, 0] = counts.shape[1]
    if rows is not None:
        sizes[:, 1] = rows
    if along is not None:
        sizes[:, 2] = along
    lengths = 8 * (_SIZES + sizes[:, 0] + sizes[:, 1] + (sizes[:, 2] + 1) // 2)
    message = np.empty(int(lengths.sum()), np.uint8)
    _pack(message, lengths, header, sizes, counts, index, numbers)
    return message, lengths


@dataclass(frozen=True)
class Opened:
    """Messages from all ranks whose headers have been read, and nothing behind them yet.

    Attributes:
        headers: int64 (W, HEADER).
    """

    headers: Words
    sizes: Words
    addresses: Words
    messages: Sequence[Octets]  # which live as long as the addresses are used

    def unpack(self) -> Told:
        """What follows the headers, once these are known to agree: each of as many counts."""
        sizes = self.sizes
        _, rows, along = sizes.sum(axis=0).tolist()
        counts = np.empty((len(sizes), int(sizes[0, 0])), np.int64)
        at, numbers = np.empty(rows, np.int64), np.empty(along, np.int32)
        _unpack(self.addresses, sizes, counts, at, numbers)
        return Told(counts, sizes[:, 1].tolist(), at, numbers)


def open_messages(messages: Sequence[Octets]) -> Opened:
    """Read the headers of messages, one from every rank."""
    addresses = np.array([message.__array_interface__["data"][0] for message in messages], np.int64)
    headers, sizes = np.empty((len(messages), HEADER), np.int64), np.empty((len(messages), 3), np.int64)
    _open(addresses, headers, sizes)
    return Opened(headers, sizes, addresses, messages)


@compiled
def _pack(message, lengths, header, sizes, counts, index, numbers):
    into, row, number = message.ctypes.data, 0, 0
    for rank in range(lengths.size):
        at, stop = into, into + lengths[rank]
        copy_bytes(at, header.ctypes.data, header.nbytes)
        at += header.nbytes
        copy_bytes(at, sizes[rank].ctypes.data, 24)
        at += 24
        copy_bytes(at, counts[rank].ctypes.data, 8 * sizes[rank, 0])
        at += 8 * sizes[rank, 0]
        copy_bytes(at, index.ctypes.data + 8 * row, 8 * sizes[rank, 1])
        at += 8 * sizes[rank, 1]
        copy_bytes(at, numbers.ctypes.data + 4 * number, 4 * sizes[rank, 2])
        row, number, into = row + sizes[rank, 1], number + sizes[rank, 2], stop


@compiled
def _open(addresses, headers, sizes):
    for rank in range(addresses.size):
        copy_bytes(headers[rank].ctypes.data, addresses[rank], 8 * HEADER)
        copy_bytes(sizes[rank].ctypes.data, addresses[rank] + 8 * HEADER, 24)


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
