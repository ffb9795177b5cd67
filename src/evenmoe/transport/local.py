"""`local`: the ranks of a group are threads of this process; rows cross by being read where they lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from evenmoe.errors import LostRankError
from evenmoe.transport.transport import Buffers, GroupEnd, Ints, Members

Exchange = tuple[Members, int]  # its members, and its number among theirs
Brought = dict[int, Any]  # by rank, what it brought


@dataclass(frozen=True)
class _Departure:
    """Why a rank will not come again, and which ranks made it leave: none if it left by itself."""

    reason: str
    because_of: tuple[int, ...] = ()


class Rendezvous:
    """Where the ranks of one group meet for an exchange: each brings a value, and waits until all have come.

    One rendezvous serves one group. Two exchanges never mix, since each is told by its members and its number.
    """

    def __init__(self, name: str, world_size: int, timeout_s: float) -> None:
        self.name, self.world_size, self.timeout_s = name, world_size, timeout_s
        self._changed = threading.Condition()
        self._brought: dict[Exchange, Brought] = {}
        self._readers: dict[Exchange, int] = {}  # exchange -> ranks that have not read it yet
        self._gone: dict[int, _Departure] = {}

    def meet(self, rank: int, exchange: Exchange, value: object, members: Ints) -> Brought:
        """Bring `value` as `rank` and return {rank: value} of all members."""
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            brought = self._brought.setdefault(exchange, {})
            brought[rank] = value
            self._readers.setdefault(exchange, len(members))
            if len(brought) == len(members):
                self._changed.notify_all()
            while len(brought) < len(members):
                if self._gone:
                    missing = [r for r in members if r not in brought]
                    if not self._gone.keys().isdisjoint(missing):
                        raise self._lost(rank, missing)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    missing = [r for r in members if r not in brought]
                    self._gone[rank] = _Departure(
                        f"gave up after {self.timeout_s:g} s of waiting for ranks {missing}", tuple(missing)
                    )
                    self._changed.notify_all()
                    raise LostRankError(
                        f"rank {rank} waited {self.timeout_s:g} s in group {self.name!r} for ranks {missing}, "
                        "which did not call",
                        tuple(missing),
                    )
                self._changed.wait(remaining)
            self._readers[exchange] -= 1
            if self._readers[exchange] == 0:
                del self._brought[exchange], self._readers[exchange]
            return dict(sorted(brought.items()))

    def leave(self, rank: int, reason: str, because_of: tuple[int, ...] = ()) -> None:
        """Say that `rank` will not come again, and wake whoever waits for it."""
        with self._changed:
            self._gone.setdefault(rank, _Departure(reason, because_of))
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget exchanges and departures, for the next run of the same world."""
        with self._changed:
            self._brought.clear()
            self._readers.clear()
            self._gone.clear()

    def _lost(self, rank: int, missing: Ints) -> LostRankError:
        """Name the ranks that left by themselves; those that left because of others only if there is nobody else."""
        gone = {r: self._gone[r] for r in missing if r in self._gone}
        guilty = [r for r, departure in gone.items() if not departure.because_of]
        if not guilty:
            behind = {r for departure in gone.values() for r in departure.because_of if r != rank}
            guilty = sorted(behind & set(self._gone)) or sorted(gone)
        first = guilty[0]
        return LostRankError(
            f"rank {rank} waits in group {self.name!r} for rank {first}, which {self._gone[first].reason}",
            tuple(guilty),
        )


class LocalTransport(GroupEnd):
    """One rank's end of a group of threads; implements `Transport`."""

    def __init__(self, rendezvous: Rendezvous, rank: int, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(rendezvous.name, rank, rendezvous.world_size)
        self._rendezvous, self._on_close = rendezvous, on_close
        self._buffers = Buffers()
        self._meeting = False  # not yet counted
        self._last: dict[int, torch.Tensor] = {}  # the counts of the last exchange, by rank

    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(shape)  # slower ranks may still read those of the last exchange

    def last_counts(self) -> torch.Tensor:
        received = torch.zeros_like(self._last[self.rank])
        for source, theirs in self._last.items():
            received[source] = theirs[self.rank]
        return received

    def restart(self, number: int) -> None:
        """Begin the next run of the same world, in which every rank counts its exchanges from `number`."""
        self._broken, self._meeting = None, False
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
        if not reuse:
            return torch.cat(parts)
        received = self._buffers.take("received", (sum(recv_counts), *rows.shape[1:]), rows)
        return torch.cat(parts, out=received)

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
        key = () if members is None else self._key(members)
        self._meeting = True
        brought = self._rendezvous.meet(self.rank, (key, self._numbers[key]), value, members or range(self.world_size))
        if isinstance(value, torch.Tensor):
            self._last = brought
        self._count(members)
        self._meeting = False
        return brought
