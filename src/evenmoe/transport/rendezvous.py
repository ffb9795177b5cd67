"""`Rendezvous`: where the ranks of a group of threads meet, and wait until nobody reads what they brought."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evenmoe.errors import LostRankError
from evenmoe.transport.transport import Ints, Members

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
        self._taken: dict[tuple[Members, int], int] = {}  # (members, rank) -> exchanges of theirs that it has made
        self._gone: dict[int, _Departure] = {}
        self._read: dict[tuple[Members, int], int] = {}  # likewise, that it does not read any more

    def meet(self, rank: int, exchange: Exchange, value: object, members: Ints) -> Brought:
        """Bring `value` as `rank` and return {rank: value} of all members; it may be repeated until `take`."""
        with self._changed:
            brought = self._brought.setdefault(exchange, {})
            brought[rank] = value
            if len(brought) == len(members):
                self._changed.notify_all()
            self._wait(rank, lambda: [r for r in members if r not in brought] if len(brought) < len(members) else [])
            return dict(sorted(brought.items()))

    def take(self, rank: int, exchange: Exchange, members: Ints) -> None:
        """Say that `rank` has what it met for."""
        key, number = exchange
        with self._changed:
            self._taken[key, rank] = number + 1
            if all(self._taken.get((key, r), 0) > number for r in members):
                self._brought.pop(exchange, None)

    def has_brought(self, rank: int, exchange: Exchange) -> bool:
        """Whether `rank` has brought its value, which the others may have met by now."""
        with self._changed:
            return rank in self._brought.get(exchange, ()) or self._taken.get((exchange[0], rank), 0) > exchange[1]

    def has_taken(self, rank: int, exchange: Exchange) -> bool:
        """Whether `rank` has what it met for."""
        with self._changed:
            return self._taken.get((exchange[0], rank), 0) > exchange[1]

    def say_read(self, rank: int, exchange: Exchange, members: Ints) -> None:
        """Say that `rank` does not read any more what was brought to an exchange, or to one before."""
        key, number = exchange
        with self._changed:
            self._read[key, rank] = number + 1
            if all(self._read.get((key, r), 0) > number for r in members):
                self._changed.notify_all()

    def wait_for_readers(self, rank: int, exchange: Exchange, members: Ints) -> None:
        """Wait until no other rank reads what was brought to an exchange."""
        key, number = exchange
        with self._changed:
            self._wait(rank, lambda: [r for r in members if self._read.get((key, r), 0) <= number])

    def _wait(self, rank: int, find_missing: Callable[[], list[int]]) -> None:
        """Wait until nobody is missing; within `self._changed`."""
        deadline = time.monotonic() + self.timeout_s
        while missing := find_missing():
            if not self._gone.keys().isdisjoint(missing):
                raise self._lost(rank, missing)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
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

    def leave(self, rank: int, reason: str, because_of: tuple[int, ...] = ()) -> None:
        """Say that `rank` will not come again, and wake whoever waits for it."""
        with self._changed:
            self._gone.setdefault(rank, _Departure(reason, because_of))
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget exchanges and departures, for the next run of the same world."""
        with self._changed:
            self._brought.clear()
            self._taken.clear()
            self._gone.clear()
            self._read.clear()

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
