"""A world of ranks, and worlds whose ranks are threads of this process.

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
from operator import index as whole_number
from typing import Generic, TypeVar

import torch

from evenmoe.errors import ConstraintError, LostRankError
from evenmoe.transport.local import LocalTransport, Rendezvous
from evenmoe.transport.transport import Transport, register, unregister

Result = TypeVar("Result")
_world_numbers = itertools.count()
_SIGNAL_CHECK_S = 0.2  # a signal that arrives just before a wait, or in a rank's thread, does not end the wait
_INTERRUPT_PATIENCE_S = 1.0  # after Ctrl-C, for ranks that wait to notice; those that compute are left to themselves


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
            raise ConstraintError(
                "run", f"called on a world that {self._closed}", "needs an open world", "open another"
            )
        if not self._running.acquire(blocking=False):
            raise ConstraintError(
                "run",
                "called while another thread runs the same world",
                "serves one call at a time",
                "wait for it, or open a world for each thread",
            )
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
    sizes = []
    for name, size, most, why in (
        ("ep_size", ep_size, None, "a world has at least one rank"),
        ("tp_size", tp_size, 2, "the operators serve two tensor-parallel peers at most"),
    ):
        try:
            number = whole_number(size)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise ConstraintError(name, repr(size), "must be an integer", "pass the number of ranks") from None
        if number < 1 or isinstance(size, bool):
            raise ConstraintError(name, size, "must be 1 or more", "a world has at least one rank")
        if most is not None and number > most:
            raise ConstraintError(name, size, f"must be 1 or {most}", why)
        sizes.append(number)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise ConstraintError(
            "timeout_s", repr(timeout_s), "must be a number of seconds above 0", "say how long to wait for a rank"
        )
    return sizes[0], sizes[1], float(timeout_s)
