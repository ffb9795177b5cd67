"""`shared_memory`: the ranks are processes of one host, and read each other's rows where they lie.

Counts and messages go through a rank's window; rows that already lie in memory that the group shares are shown as they
are, others are copied into the window once, however many ranks read them. Tensors on other devices take the way of
`process_group`, whose connections are also what lost ranks are known by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import numpy as np
import torch
import torch.distributed as dist

from evenmoe.compiled import compiled
from evenmoe.errors import LostRankError
from evenmoe.transport.arena import Arena
from evenmoe.transport.mesh import LastWord, Mesh
from evenmoe.transport.packets import Views, row_bytes
from evenmoe.transport.posts import TABLE, Posts, Words
from evenmoe.transport.process_group import ProcessGroupTransport
from evenmoe.transport.segment import Octets
from evenmoe.transport.transport import Ints

# Rows of fewer bytes are copied even where they could be read in place: the copy costs less than waiting for the
# readers, 5 µs against two changes of process.
_IN_PLACE = 1 << 18
_STOPPED, _LATE = "it was waited for in shared memory", "no post in shared memory in time"


class SharedMemoryTransport(ProcessGroupTransport):
    """One rank's end of a group of processes on one host.

    Args:
        memory: what the ranks share, as `segment.share_memory` returns it.
        group, mesh, give_up, on_close, timeout_s: as in `ProcessGroupTransport`.
    """

    kind, description = "shared_memory", "shared memory of one host"

    def __init__(
        self,
        memory: Octets,
        group: dist.ProcessGroup,
        mesh: Mesh,
        give_up: Callable[[dist.ProcessGroup], None] | None = None,
        on_close: Callable[[], None] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__(group, mesh, give_up, on_close, timeout_s)
        self._connections, self._patience_s = mesh, timeout_s
        self._posts = Posts(memory, self.rank, self.world_size)
        each = len(memory) // self.world_size
        first = -(-self._posts.size // 4096) * 4096 if self.rank == 0 else 0
        self._arena = Arena(memory, self.rank * each + first, (self.rank + 1) * each)
        self._everybody = np.arange(self.world_size)
        self._last_views = Views(*np.zeros((4, 0), np.int64))
        self._in_midst = False  # posted, perhaps, and not counted
        self._reading: Words | None = None  # ranks that may not use again yet what they have posted here
        self._in_place: list[int] = []  # those of them that have not copied their rows
        # Posts that must have been read before a window is filled anew, or rows in place are given back.
        self._in_window = np.zeros((2, self.world_size), np.int64)
        self._lent: Words | None = None

    def shows_rows(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def new_rows(self, shape: tuple[int, ...], like: torch.Tensor, filled: int | None = None) -> torch.Tensor | None:
        if like.device.type != "cpu" or prod(shape) * like.element_size() < _IN_PLACE:
            return None
        try:
            return self._arena.keep(shape, like.dtype, None if filled is None else filled * row_bytes(shape, like))
        except MemoryError:  # beside what callers hold; they get memory of their own, which is copied when it is shown
            return None

    def _exchange_counts(self, counts: torch.Tensor, members: Ints | None) -> torch.Tensor:
        if counts.device.type != "cpu":
            return super()._exchange_counts(counts, members)
        counts = counts.contiguous()
        self._last_counts = torch.zeros_like(counts)
        received = self._last_counts.numpy()
        each = counts.shape[1] * counts.element_size()
        offset = self._fill_window(counts)
        starts = offset + each * np.arange(self.world_size)

        def copy(theirs: Words, ranks: Words) -> None:
            for rank in ranks.tolist():
                start, size = theirs[rank, :2].tolist()
                received[rank] = self._arena.at(start, size).view(np.int64)

        self._swap(_tables(starts, np.full(self.world_size, each)), members, copy)
        self._say_read()
        return self._last_counts

    def _exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None, reuse: bool
    ) -> torch.Tensor:
        if rows.device.type != "cpu":
            return super()._exchange_rows(rows, send_counts, recv_counts, members, reuse)
        shape, each = (sum(recv_counts), *rows.shape[1:]), row_bytes(rows.shape, rows)
        received = self._buffers.take("received", shape, rows) if reuse else rows.new_empty(shape)
        into = octets_of(received)
        sent = np.array(send_counts) * each
        starts = self._fill_window(rows) + np.cumsum(sent) - sent

        def copy(theirs: Words, ranks: Words) -> None:
            begin = 0
            for rank in ranks.tolist():
                start, size = theirs[rank, :2].tolist()
                assert size == recv_counts[rank] * each, (rank, size, recv_counts, each)
                into[begin : begin + size] = self._arena.at(start, size)
                begin += size

        self._swap(_tables(starts, sent), members, copy)
        self._say_read()
        return received

    def last_views(self) -> Views:
        return self._last_views

    def _exchange_views(self, rows: torch.Tensor, message: Octets, lengths: Words, members: Ints | None) -> Views:
        count, each = rows.shape[0], row_bytes(rows.shape, rows)
        at = self._arena.offset_of(rows) if count * each >= _IN_PLACE else -1
        lent = at >= 0
        start = self._fill_window(message)
        if not lent:
            at = self._arena.take(count * each)
            self._arena.write(at, rows)
        tables = np.zeros((self.world_size, TABLE), np.int64)
        fill_tables(tables, start, lengths, at, count, lent, each)

        def look(theirs: Words, _ranks: Words) -> None:
            found = np.zeros((5, self.world_size), np.int64)
            lending = read_tables(theirs, self._arena.address(0), each, found)
            self._in_place = np.flatnonzero(found[4]).tolist() if lending else []
            self._last_views = Views(*found[:4])

        self._swap(tables, members, look, lent)
        return self._last_views

    def _stop_reading(self) -> None:
        if self._reading is not None:
            if self._posts.gone(self._in_place):  # it may have written to its rows since
                raise self._lost(_STOPPED, time.monotonic())
            self._say_read(ring=bool(self._in_place))

    def _end_reading(self) -> None:
        self._stop_reading()
        if self._lent is not None:
            self._wait_for_readers(self._lent)
            self._lent = None

    @property
    def _unsure(self) -> bool:
        return self._in_midst or super()._unsure

    def _stop(self, word: LastWord) -> None:
        self._posts.say_gone()
        super()._stop(word)

    def _fill_window(self, values: np.ndarray | torch.Tensor) -> int:
        """Begin a window with the bytes of `values`, once nobody reads what it held; their offset."""
        self._end_reading()
        window = self._posts.total % 2
        self._wait_for_readers(self._in_window[window])
        self._arena.open_window(window)
        size = values.nbytes
        offset = self._arena.take(size)
        self._arena.write(offset, values)
        return offset

    def _swap(
        self, tables: Words, members: Ints | None, finish: Callable[[Words, Words], None], lent: bool = False
    ) -> None:
        """Post `tables`, and call `finish` with those that the others have posted here: whatever fails once the post is
        made, the exchange is completed and counted, since the others count it.
        """
        ranks = self._everybody if members is None else np.array(members)
        number, start, before = self.number(members), time.monotonic(), self._posts.total
        self._in_window[before % 2] = due = self._posts.next_to(ranks)
        if lent:
            self._lent = due
        try:
            self._in_midst = True
            self._posts.post(ranks, tables)
            self._complete(ranks, finish, start)
            self._count(members)
            self._in_midst = False
        except LostRankError:
            raise
        except Exception:
            if self._posts.total > before:
                self._complete(ranks, finish, start)
                if self.number(members) == number:
                    self._count(members)
            self._in_midst = False
            raise

    def _complete(self, ranks: Words, finish: Callable[[Words, Words], None], start: float) -> None:
        def watch(rank: int) -> str:
            if self._has_stopped(rank):
                return _STOPPED
            return _LATE if time.monotonic() - start >= self._patience_s else ""

        if failure := self._posts.wait_for_posts(ranks, watch):
            raise self._lost(failure, start)
        self._reading = ranks
        finish(self._posts.tables(ranks), ranks)

    def _wait_for_readers(self, due: Words) -> None:
        """Wait until ranks have read the posts `due`, as far as these were made; a rank that has stopped reads none."""
        if self._posts.all_have_read(due):
            return
        due, start = due.copy(), time.monotonic()

        def watch(rank: int) -> str:
            if self._has_stopped(rank):
                due[rank] = 0
            return _LATE if time.monotonic() - start >= self._patience_s else ""

        if failure := self._posts.wait_for_readers(due, watch):
            raise self._lost(failure, start)

    def _has_stopped(self, rank: int) -> bool:
        return bool(self._posts.gone([rank])) or self._connections.stopped_already([rank])

    def _say_read(self, ring: bool = False) -> None:
        if self._reading is not None:
            self._posts.say_read(self._reading, ring)
        self._reading, self._in_place = None, []


def octets_of(tensor: torch.Tensor) -> Octets:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    # The strides of a contiguous tensor may be anything where a dimension is 0 or 1, and view(dtype) minds them.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def _tables(*columns: np.ndarray) -> Words:
    """Posts to all ranks, of which each of `columns`, (W,), is a word: int64 (W, TABLE)."""
    tables = np.zeros((len(columns[0]), TABLE), np.int64)
    for position, column in enumerate(columns):
        tables[:, position] = column
    return tables


@compiled
def fill_tables(tables, start, lengths, at, count, lent, row_bytes):
    """Posts to all ranks, int64 (W, TABLE): where each one's message begins, and its bytes; where the rows begin, how
    many they are, whether they must not be written to while they are read, and the bytes of one.

    >>> tables = np.zeros((2, 8), np.int64)
    >>> fill_tables(tables, 64, np.array([8, 16]), 128, 3, True, 4)
    >>> tables[:, :6].tolist()
    [[64, 8, 128, 3, 1, 4], [72, 16, 128, 3, 1, 4]]
    """
    for rank in range(lengths.size):
        tables[rank, 0], tables[rank, 1], tables[rank, 2] = start, lengths[rank], at
        tables[rank, 3], tables[rank, 4], tables[rank, 5] = count, lent, row_bytes
        start += lengths[rank]


@compiled
def read_tables(tables, memory, row_bytes, found):
    """What such posts say: the four fields of `Views`, and which ranks lend their rows; whether any does.

    >>> tables, found = np.array([[64, 8, 128, 3, 1, 4, 0, 0], [0, 16, 256, 3, 0, 8, 0, 0]]), np.zeros((5, 2), np.int64)
    >>> read_tables(tables, 1000, 4, found)
    True
    >>> found.tolist()  # rows of 8 bytes are of another call
    [[1128, 1256], [3, 0], [1064, 1000], [8, 16], [1, 0]]
    """
    lending = False
    for rank in range(tables.shape[0]):
        found[0, rank], found[2, rank], found[3, rank] = (
            tables[rank, 2] + memory,
            tables[rank, 0] + memory,
            tables[rank, 1],
        )
        found[1, rank] = tables[rank, 3] if tables[rank, 5] == row_bytes else 0
        found[4, rank] = tables[rank, 4]
        lending |= tables[rank, 4] != 0
    return lending
