"""Who has posted what to whom, in memory that all ranks of a group share: numbers of posts, and how far they are read.

Rank s posts to rank d by writing a table of eight words and raising the number `posted[s, d]`; rank d reads the table
when that number has reached its own `posted[d, s]`, since every exchange is a post in both directions. It says that it
has read by raising `read[d, s]`. Every word has one writer; numbers are stored with release and loaded with acquire
order (`raw_memory`). Of two tables in turn the older is free: whoever posts to a rank has read what came from it
before.

Shapes: W ranks; all words int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled, compiled_inner
from evenmoe.transport.raw_memory import copy_bytes, fence_acquire, load_acquire, store_release
from evenmoe.transport.segment import Octets, wait_for_change, wake

#: What a wait asks every few hundredths of a second of a rank that it waits for: "" to go on, or why to give up.
Watch = Callable[[int], str]
Words = npt.NDArray[np.int64]

TABLE = 8  # words of a post
_LINE = 8  # words of a cache line: what different ranks write stands on different lines
_BELL, _GONE, _TOTAL = range(3)  # of a rank's own line: changes at every post; makes no exchange any more; posts so far
# Looks before a rank sleeps, about 10 µs: where ranks have a core each the others come in that time, and where they do
# not, longer would take the core from them.
_LOOKS = 300
_SLICE_S = 0.02  # of a sleep, after which a rank looks whether those that it waits for are there at all


class Posts:
    """One rank's view of the posts of its group.

    Attributes: `rank`, `world_size`; `size`, bytes at the beginning of the memory that are in use here.
    """

    def __init__(self, memory: Octets, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        words = _LINE * world_size + world_size * (2 * _width(world_size) + 2 * TABLE * world_size)
        self.size = 8 * words
        self._words: Words = memory[: self.size].view(np.int64)
        self._address = self._words.ctypes.data

    @property
    def total(self) -> int:
        """Posts that this rank has made so far."""
        return int(self._words[_LINE * self.rank + _TOTAL])

    def next_to(self, ranks: Words) -> Words:
        """(W,), the numbers of the next posts to `ranks`; 0 for the others and for this rank."""
        numbers = np.zeros(self.world_size, np.int64)
        _next_to(self._words, self.world_size, self.rank, ranks, numbers)
        return numbers

    def post(self, ranks: Words, tables: Words) -> None:
        """Post to `ranks`; row d of `tables`, (W, TABLE), is for rank d."""
        _post(self._words, self.world_size, self.rank, ranks, tables)
        wake(self._bell(self.rank))

    def tables(self, ranks: Words) -> Words:
        """(W, TABLE), what each of `ranks` has posted here, all of which have come; zeros for the others."""
        tables = np.zeros((self.world_size, TABLE), np.int64)
        _tables(self._words, self.world_size, self.rank, ranks, tables)
        return tables

    def say_read(self, ranks: Words, ring: bool) -> None:
        """Say that what `ranks` have posted so far will not be read any more, and wake who waits for it if `ring`."""
        _say_read(self._words, self.world_size, self.rank, ranks)
        if ring:
            wake(self._bell(self.rank))

    def say_gone(self) -> None:
        """Say that this rank makes no exchange any more."""
        _say_gone(self._words, self.rank)
        wake(self._bell(self.rank))

    def gone(self, ranks: Sequence[int]) -> list[int]:
        """Those of `ranks` that make no exchange any more; all that was read before this call came before that."""
        return [rank for rank in ranks if _is_gone(self._words, rank)]

    def wait_for_posts(self, ranks: Words, watch: Watch) -> str:
        """Wait until all of `ranks` have made as many posts to this rank as it to them.

        Returns:
            "" if they have; else what `watch` said of one that had not.
        """
        return self._wait(lambda looks: _first_missing(self._words, self.world_size, self.rank, ranks, looks), watch)

    def wait_for_readers(self, numbers: Words, watch: Watch) -> str:
        """Wait until every rank d has read the post `numbers[d]` of this rank, or the last that was made where that is
        less; 0 where nothing is waited for.

        Returns:
            As `wait_for_posts`.
        """
        return self._wait(lambda looks: _first_behind(self._words, self.world_size, self.rank, numbers, looks), watch)

    def all_have_read(self, numbers: Words) -> bool:
        """Whether there is nothing to wait for."""
        return _first_behind(self._words, self.world_size, self.rank, numbers, 1) < 0

    def _wait(self, first: Callable[[int], int], watch: Watch) -> str:
        while (rank := first(_LOOKS)) >= 0:
            # The bell is read before the last look: whatever comes after that look has changed it, and nobody sleeps.
            bell = int(_read_bell(self._words, rank))
            if first(1) != rank:
                continue
            if not self.gone([rank]):
                wait_for_change(self._bell(rank), bell, _SLICE_S)
            reason = watch(rank) if first(1) == rank else ""
            if reason and first(1) == rank:  # it may have posted before it stopped
                return reason
        return ""

    def _bell(self, rank: int) -> int:
        return self._address + 8 * (_LINE * rank + _BELL)  # its lower half comes first


def _width(world_size: int) -> int:
    return -(-world_size // _LINE) * _LINE


# Compiled: `words` is all of them, W ranks, `me` this one ---------------------------------------------------------


@compiled_inner
def _posted_at(words, world_size, rank):
    """The address of posted[rank, 0]."""
    return words.ctypes.data + 8 * (_LINE * world_size + rank * (-(-world_size // _LINE) * _LINE))


@compiled_inner
def _read_at(words, world_size, rank):
    """The address of read[rank, 0]."""
    return _posted_at(words, world_size, world_size + rank)


@compiled_inner
def _table_at(words, world_size, source, rank, number):
    """The address of the table of post `number` of a source to a rank."""
    first = _posted_at(words, world_size, 2 * world_size)
    return first + 8 * TABLE * (2 * (source * world_size + rank) + number % 2)


@compiled
def _next_to(words, world_size, me, ranks, numbers):
    for rank in ranks:
        if rank != me:
            numbers[rank] = load_acquire(_posted_at(words, world_size, me) + 8 * rank) + 1


@compiled
def _post(words, world_size, me, ranks, tables):
    posted = _posted_at(words, world_size, me)
    for rank in ranks:
        number = load_acquire(posted + 8 * rank) + 1
        copy_bytes(_table_at(words, world_size, me, rank, number), tables[rank].ctypes.data, 8 * TABLE)
        store_release(posted + 8 * rank, number)
    line = words.ctypes.data + 8 * _LINE * me
    store_release(line + 8 * _TOTAL, load_acquire(line + 8 * _TOTAL) + 1)
    store_release(line + 8 * _BELL, load_acquire(line + 8 * _BELL) + 1)


@compiled
def _tables(words, world_size, me, ranks, tables):
    for rank in ranks:
        number = load_acquire(_posted_at(words, world_size, me) + 8 * rank)
        copy_bytes(tables[rank].ctypes.data, _table_at(words, world_size, rank, me, number), 8 * TABLE)


@compiled
def _say_read(words, world_size, me, ranks):
    for rank in ranks:
        number = load_acquire(_posted_at(words, world_size, me) + 8 * rank)
        store_release(_read_at(words, world_size, me) + 8 * rank, number)
    bell = words.ctypes.data + 8 * (_LINE * me + _BELL)
    store_release(bell, load_acquire(bell) + 1)


@compiled
def _say_gone(words, me):
    line = words.ctypes.data + 8 * _LINE * me
    store_release(line + 8 * _GONE, 1)
    store_release(line + 8 * _BELL, load_acquire(line + 8 * _BELL) + 1)


@compiled
def _first_missing(words, world_size, me, ranks, looks):
    """The first of `ranks` that has posted less to this rank than it to them, after so many looks; else −1."""
    for rank in ranks:
        due = load_acquire(_posted_at(words, world_size, me) + 8 * rank)
        theirs = _posted_at(words, world_size, rank) + 8 * me
        while load_acquire(theirs) < due:
            looks -= 1
            if looks <= 0:
                return rank
    return -1


@compiled
def _first_behind(words, world_size, me, numbers, looks):
    """The first rank that has not read as many posts of this rank as `numbers` says, after so many looks; else −1."""
    for rank in range(world_size):
        due = min(numbers[rank], load_acquire(_posted_at(words, world_size, me) + 8 * rank))
        while load_acquire(_read_at(words, world_size, rank) + 8 * me) < due:
            looks -= 1
            if looks <= 0:
                return rank
    return -1


@compiled
def _read_bell(words, rank):
    return np.int32(load_acquire(words.ctypes.data + 8 * (_LINE * rank + _BELL)))


@compiled
def _is_gone(words, rank):
    fence_acquire()
    return load_acquire(words.ctypes.data + 8 * (_LINE * rank + _GONE)) != 0
