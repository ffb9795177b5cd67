"""Worlds of ranks, and `local`: the ranks are threads of this process; rows cross by being read where they lie.

A world has `ep_size × tp_size` ranks, numbered EP-major: rank d is EP rank d // tp_size and TP rank d % tp_size, as the
devices of the operators' published demo are.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from evenmoe.errors import ConstraintError, LostRankError, as_integer, require
from evenmoe.transport.packets import Views, row_bytes
from evenmoe.transport.pending import Setups
from evenmoe.transport.rendezvous import Brought, Exchange, Rendezvous
from evenmoe.transport.segment import Octets
from evenmoe.transport.transport import Buffers, Counted, Ints, Members, Transport, register, unregister

Result = TypeVar("Result")
_world_numbers = itertools.count()
_SIGNAL_CHECK_S = 0.2  # a signal that arrives just before a wait, or in a rank's thread, does not end the wait
_INTERRUPT_PATIENCE_S = 1.0  # after Ctrl-C, for ranks that wait to notice; those that compute are left to themselves


@dataclass(frozen=True)
class _Shown:
    """What a rank shows: its rows, and the messages for all ranks, with int64 (W,) addresses and bytes of these."""

    rows: torch.Tensor
    message: Octets
    at: Counted
    lengths: Counted

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.rows.shape, self.rows)


class LocalTransport(Transport):
    """One rank's end of a group of threads."""

    kind, description = "local", "threads of one process"

    def __init__(self, rendezvous: Rendezvous, rank: int, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(rendezvous.name, rank, rendezvous.world_size)
        self._rendezvous, self._on_close = rendezvous, on_close
        self._buffers = Buffers()
        self._meeting = False  # not yet counted
        self._last: Brought = {}  # to the last exchange
        # Members and number of the exchange whose rows this rank still reads, and of that whose rows others may read.
        self._reading: tuple[Members, Exchange] | None = None
        self._lent: tuple[Members, Exchange] | None = None

    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(shape)  # slower ranks may still read those of the last exchange

    def last_counts(self) -> torch.Tensor:
        received = torch.zeros_like(self._last[self.rank])
        for source, theirs in self._last.items():
            received[source] = theirs[self.rank]
        return received

    def shows_rows(self, device: torch.device) -> bool:
        return device.type == "cpu"  # what other devices compute is not done when their calls return

    def last_views(self) -> Views:
        found, row_bytes = np.zeros((4, self.world_size), np.int64), self._last[self.rank].row_bytes
        for source, shown in self._last.items():
            count = len(shown.rows) if shown.row_bytes == row_bytes else 0  # its call is another one
            found[:, source] = shown.rows.data_ptr(), count, shown.at[self.rank], shown.lengths[self.rank]
        return Views(*found)

    def restart(self, number: int) -> None:
        """Begin the next run of the same world, in which every rank counts its exchanges from `number`."""
        self._broken, self._meeting, self._reading, self._lent = None, False, None, None
        self.setups = Setups()
        self._numbers.clear()
        self._numbers[()] = number

    def _exchange_counts(self, counts: torch.Tensor, members: Ints | None) -> torch.Tensor:
        # A copy, since the caller may write to its counts while a slower rank still reads them.
        self._meet(counts.clone(), members)
        return self.last_counts()

    def _exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None, reuse: bool
    ) -> torch.Tensor:
        assert sum(send_counts) == rows.shape[0], (send_counts, rows.shape)
        parts = []
        for source, (theirs, counts) in self._meet((rows, list(send_counts)), members).items():
            assert counts[self.rank] == recv_counts[source], (source, counts, recv_counts)
            start = sum(counts[: self.rank])
            parts.append(theirs[start : start + counts[self.rank]])
        self._last = {}  # nobody's rows are kept
        if not reuse:
            return torch.cat(parts)
        received = self._buffers.take("received", (sum(recv_counts), *rows.shape[1:]), rows)
        return torch.cat(parts, out=received)

    def _exchange_views(self, rows: torch.Tensor, message: Octets, lengths: Counted, members: Ints | None) -> Views:
        self._end_reading()
        self._meet(_Shown(rows, message, message.ctypes.data + lengths.cumsum() - lengths, lengths), members)
        return self.last_views()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            members, exchange = self._reading
            self._rendezvous.say_read(self.rank, exchange, members)
            self._reading, self._last = None, {}

    def _end_reading(self) -> None:
        self._stop_reading()
        if self._lent is not None:
            members, exchange = self._lent
            self._rendezvous.wait_for_readers(self.rank, exchange, members)
            self._lent = None

    @property
    def _unsure(self) -> bool:
        return self._meeting

    def _tell(self, reason: str, because_of: Members | None) -> None:
        self._rendezvous.leave(self.rank, reason, because_of or ())

    def _end(self) -> None:
        self._rendezvous.leave(self.rank, "closed its transport")
        self._buffers.clear()
        if self._on_close is not None:
            self._on_close()

    def _meet(self, value: object, members: Ints | None) -> Brought:
        taking_part = tuple(members or range(self.world_size))
        exchange = self._key(taking_part), self.number(members)
        self._meeting = True
        try:
            self._complete(exchange, value, taking_part)
            self._meeting = False
        except LostRankError:
            raise
        except Exception:
            # Whatever fails once the value is brought, the exchange is made, since the others count it.
            if self._rendezvous.has_brought(self.rank, exchange):
                self._complete(exchange, value, taking_part)
            self._meeting = False
            raise
        return self._last

    def _complete(self, exchange: Exchange, value: object, members: Members) -> None:
        """Make an exchange, or what is missing of it."""
        if not self._rendezvous.has_taken(self.rank, exchange):
            self._last = self._rendezvous.meet(self.rank, exchange, value, members)
            if isinstance(value, _Shown):
                self._reading = members, exchange
                self._lent = self._reading if len(value.rows) else None  # the messages are nobody's but theirs
            self._rendezvous.take(self.rank, exchange, members)
        if self._numbers[exchange[0]] == exchange[1]:
            self._count(members)


@dataclass(frozen=True)
class Rank:
    """One rank of a world.

    Attributes:
        index: 0…ep_size·tp_size−1, EP-major.
        ep: transport over the ranks that share this TP rank; `ep.rank` is the EP rank.
        tp: transport over the ranks that share this EP rank; `tp.rank` is the TP rank. Its world_size may be 1.
    """

    index: int
    ep: Transport
    tp: Transport

    def close(self) -> None:
        """Give both groups back."""
        self.ep.close()
        self.tp.close()


class LocalWorld(Generic[Result]):
    """Ranks as threads of this process; made by `local_world`."""

    def __init__(self, ep_size: int, tp_size: int, timeout_s: float) -> None:
        self.ep_size, self.tp_size = ep_size, tp_size
        number = next(_world_numbers)
        self._ep_groups = [Rendezvous(f"local{number}_ep{t}", ep_size, timeout_s) for t in range(tp_size)]
        self._tp_groups = [Rendezvous(f"local{number}_tp{e}", tp_size, timeout_s) for e in range(ep_size)]
        self._transports: list[LocalTransport] = []
        self._running = threading.Lock()
        self._closed = ""  # why no run may follow
        self.ranks: list[Rank] = []
        for index in range(ep_size * tp_size):
            e, t = divmod(index, tp_size)
            ep, tp = LocalTransport(self._ep_groups[t], e), LocalTransport(self._tp_groups[e], t)
            self._transports += [ep, tp]
            self.ranks.append(Rank(index, ep, tp))
        for transport in self._transports:
            register(transport)

    def run(self, fn: Callable[[Rank], Result]) -> list[Result]:
        """Call `fn(rank)` on every rank, each in a thread of its own; return the results in rank order.

        An interrupt (Ctrl-C) ends the wait at once and closes the world.

        Raises:
            Exception: the first failure of any rank, with its rank in `.rank` and, from Python 3.11, in a note. The
                other ranks are woken from whatever exchange they wait in; none is left behind.
            ConstraintError: the world is closed, or another thread's run is not over.
        """
        if self._closed:
            value = f"called on a world that {self._closed}"
            raise ConstraintError("run", value, "needs an open world", "open another")
        if not self._running.acquire(blocking=False):
            value, fix = (
                "called while another thread runs the same world",
                "wait for it, or open a world for each thread",
            )
            raise ConstraintError("run", value, "serves one call at a time", fix)
        try:
            return self._run(fn)
        finally:
            self._running.release()

    def close(self) -> None:
        """Give the groups back; no run may follow."""
        self._closed = self._closed or "has been closed"
        for transport in self._transports:
            unregister(transport)
            transport.close()

    def _run(self, fn: Callable[[Rank], Result]) -> list[Result]:
        for rendezvous in self._ep_groups + self._tp_groups:
            rendezvous.reset()
        number = max(transport.number() for transport in self._transports)
        for transport in self._transports:
            transport.restart(number)
        results: dict[int, Result] = {}
        failures: list[tuple[int, BaseException]] = []  # in the order they happened
        threads_before = torch.get_num_threads()
        threads_each = max(1, threads_before // len(self.ranks))

        def body(rank: Rank) -> None:
            reason, because_of = "ended its part of the run", ()
            try:
                torch.set_num_threads(threads_each)  # the ranks share the cores; a pool per rank would thrash them
                results[rank.index] = fn(rank)
                rank.ep.setups.wait()  # the other ranks wait for its rows, though this one does not
                rank.ep.setups.end()
            except BaseException as error:  # a rank may fail in any way; the first failure is raised below
                failures.append((rank.index, error))
                reason = f"failed with {type(error).__name__}: {error}"
                because_of = error.ranks if isinstance(error, LostRankError) else ()
            finally:
                self._ep_groups[rank.tp.rank].leave(rank.ep.rank, reason, because_of)
                self._tp_groups[rank.ep.rank].leave(rank.tp.rank, reason, because_of)

        # Daemons, so that a rank that computes for long does not hold up the end of an interrupted process.
        threads = [
            threading.Thread(target=body, args=(rank,), name=f"rank {rank.index}", daemon=True) for rank in self.ranks
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_SIGNAL_CHECK_S)
        except BaseException as error:
            self._interrupt(threads, type(error).__name__)
            raise
        finally:
            torch.set_num_threads(threads_before)
        if failures:
            index, error = failures[0]
            error.rank = index  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(error, "add_note"):
                error.add_note(f"raised on rank {index} of {len(self.ranks)}")  # pyright: ignore[reportAttributeAccessIssue]
            raise error
        return [results[rank.index] for rank in self.ranks]

    def _interrupt(self, threads: list[threading.Thread], error: str) -> None:
        """Close the world and wake every rank that waits; ranks that compute find it closed at their next exchange."""
        self._closed = f"was ended by {error}"
        self.close()
        deadline = time.monotonic() + _INTERRUPT_PATIENCE_S
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def local_world(ep_size: int, tp_size: int = 1, *, timeout_s: float = 600.0) -> Iterator[LocalWorld]:
    """Open a world whose ranks are threads of this process: no launcher, no network, nothing to install.

    Args:
        ep_size: expert-parallel ranks, 1 or more.
        tp_size: tensor-parallel ranks per EP rank, 1 or 2.
        timeout_s: seconds a rank waits in one exchange for a rank that does not call, before a LostRankError names it.

    Returns:
        A context manager for the world. `world.run(fn)` calls `fn(rank)` on every rank and returns the results in
        rank order (EP-major); `rank.ep` and `rank.tp` are its transports.

    Raises:
        ConstraintError: a size or a time-out that is not in its range.

    Two ranks tell each other their number:

    >>> import torch
    >>> with local_world(ep_size=2) as world:
    ...     world.run(lambda rank: rank.ep.exchange_counts(torch.full((2, 1), rank.index)).tolist())
    [[[0], [1]], [[0], [1]]]
    """
    world = LocalWorld(*check_world(ep_size, tp_size, timeout_s))
    try:
        yield world
    finally:
        world.close()


def check_world(ep_size: object, tp_size: object, timeout_s: object) -> tuple[int, int, float]:
    """The sizes as integers and the time-out as a float.

    Raises:
        ConstraintError: they make no world.
    """
    why = "a world has at least one rank"
    ep, tp = (as_integer(n, s, "pass the number of ranks") for n, s in (("ep_size", ep_size), ("tp_size", tp_size)))
    require(ep >= 1 and not isinstance(ep_size, bool), "ep_size", ep_size, "must be 1 or more", why)
    require(tp >= 1 and not isinstance(tp_size, bool), "tp_size", tp_size, "must be 1 or more", why)
    fix = "the operators serve two tensor-parallel peers at most"
    require(tp <= 2, "tp_size", tp_size, "must be 1 or 2", fix)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        rule, fix = "must be a number of seconds above 0", "say how long to wait for a rank"
        raise ConstraintError("timeout_s", repr(timeout_s), rule, fix)
    return ep, tp, float(timeout_s)
