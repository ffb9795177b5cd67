"""Opening a world: ranks as threads of this process, or as processes of a torch.distributed job.

A world has `ep_size × tp_size` ranks, numbered EP-major: rank d is EP rank d // tp_size and TP rank d % tp_size, as the
devices of the operators' published demo are.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from evenmoe.errors import ConstraintError
from evenmoe.transport import registry
from evenmoe.transport.contract import Transport
from evenmoe.transport.local import Board, LocalTransport
from evenmoe.transport.process_group import ProcessGroupTransport

Result = TypeVar("Result")
_world_numbers = itertools.count()


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
        self._ep_boards = [Board(f"local{number}_ep{t}", ep_size, timeout_s) for t in range(tp_size)]
        self._tp_boards = [Board(f"local{number}_tp{e}", tp_size, timeout_s) for e in range(ep_size)]
        self._transports: list[LocalTransport] = []
        self.ranks: list[Rank] = []
        for index in range(ep_size * tp_size):
            e, t = divmod(index, tp_size)
            ep, tp = LocalTransport(self._ep_boards[t], e), LocalTransport(self._tp_boards[e], t)
            self._transports += [ep, tp]
            self.ranks.append(Rank(index, ep, tp))
        for transport in self._transports:
            registry.register(transport)

    def run(self, fn: Callable[[Rank], Result]) -> list[Result]:
        """Call `fn(rank)` on every rank, each in a thread of its own; return the results in rank order.

        Raises:
            Exception: the first failure of any rank, with its rank in `.rank` and, from Python 3.11, in a note. The
                other ranks are woken from whatever exchange they wait in; none is left behind.
        """
        for board in self._ep_boards + self._tp_boards:
            board.return_all()
        for transport in self._transports:
            transport.restart()
        results: dict[int, Result] = {}
        failures: list[tuple[int, BaseException]] = []  # in the order they happened
        threads_before = torch.get_num_threads()
        threads_each = max(1, threads_before // len(self.ranks))

        def body(rank: Rank) -> None:
            reason = "ended its part of the run"
            try:
                torch.set_num_threads(threads_each)  # the ranks share the cores; a pool per rank would thrash them
                results[rank.index] = fn(rank)
            except BaseException as error:  # a rank may fail in any way; the first failure is raised below
                failures.append((rank.index, error))
                reason = f"failed with {type(error).__name__}: {error}"
            finally:
                self._ep_boards[rank.tp.rank].leave(rank.ep.rank, reason)
                self._tp_boards[rank.ep.rank].leave(rank.tp.rank, reason)

        threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank.index}") for rank in self.ranks]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(threads_before)
        if failures:
            index, error = failures[0]
            error.rank = index  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(error, "add_note"):
                error.add_note(f"raised on rank {index} of {len(self.ranks)}")  # pyright: ignore[reportAttributeAccessIssue]
            raise error
        return [results[rank.index] for rank in self.ranks]

    def close(self) -> None:
        for transport in self._transports:
            registry.unregister(transport)


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
        ConstraintError: a size below 1.

    Two ranks tell each other their number:

    >>> import torch
    >>> with local_world(ep_size=2) as world:
    ...     world.run(lambda rank: rank.ep.exchange_counts(torch.full((2, 1), rank.index)).tolist())
    [[[0], [1]], [[0], [1]]]
    """
    _check_sizes(ep_size, tp_size)
    world = LocalWorld(ep_size, tp_size, timeout_s)
    try:
        yield world
    finally:
        world.close()


def process_world(ep_size: int, tp_size: int = 1, *, backend: str | None = None, timeout_s: float = 600.0) -> Rank:
    """This process's rank of a world of processes, inside torchrun or an initialised torch.distributed.

    Args:
        ep_size: expert-parallel ranks; `ep_size × tp_size` must be the number of processes.
        tp_size: tensor-parallel ranks per EP rank, 1 or 2. Processes are numbered EP-major.
        backend: torch.distributed backend to start if none is initialised, and for the groups; None for torch's choice.
        timeout_s: seconds that the groups' exchanges may take before they fail.

    Returns:
        The `Rank` of this process, as `local_world` gives it to each thread.

    Raises:
        ConstraintError: a size below 1, or a product that is not the number of processes.
    """
    _check_sizes(ep_size, tp_size)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    index, processes = dist.get_rank(), dist.get_world_size()
    if ep_size * tp_size != processes:
        raise ConstraintError(
            "ep_size",
            f"{ep_size} with tp_size {tp_size}",
            f"must give the number of processes, {processes}, as ep_size * tp_size",
            f"use ep_size={processes // tp_size} with tp_size={tp_size}, or start {ep_size * tp_size} processes",
        )
    # Every process must create every group, in the same order.
    ep_groups = [
        dist.new_group([e * tp_size + t for e in range(ep_size)], timeout=timeout, backend=backend)
        for t in range(tp_size)
    ]
    tp_groups = [
        dist.new_group([e * tp_size + t for t in range(tp_size)], timeout=timeout, backend=backend)
        for e in range(ep_size)
    ]
    e, t = divmod(index, tp_size)
    return Rank(index, _process_transport(ep_groups[t]), _process_transport(tp_groups[e]))


def _process_transport(group: object) -> ProcessGroupTransport:
    assert isinstance(group, dist.ProcessGroup), "new_group gives every member of a group the group"

    def on_close() -> None:
        registry.unregister(transport)
        dist.destroy_process_group(group)

    transport = ProcessGroupTransport(group, on_close)
    registry.register(transport)
    return transport


def _check_sizes(ep_size: int, tp_size: int) -> None:
    for name, size in (("ep_size", ep_size), ("tp_size", tp_size)):
        if size < 1:
            raise ConstraintError(name, size, "must be 1 or more", "a world has at least one rank")
