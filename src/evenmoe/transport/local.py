"""`local`: the ranks of a group are threads of this process; rows cross by being read where they lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evenmoe.errors import LostRankError
from evenmoe.transport.scratch import Scratch


class Board:
    """Where the ranks of one group meet: each posts a value, and waits until all have posted.

    One board serves one group. Meetings are numbered per rank, so two exchanges never mix.
    """

    def __init__(self, name: str, world_size: int, timeout_s: float) -> None:
        self.name, self.world_size, self.timeout_s = name, world_size, timeout_s
        self._changed = threading.Condition()
        self._posts: dict[int, dict[int, object]] = {}  # meeting -> rank -> value
        self._readers: dict[int, int] = {}  # meeting -> ranks that have not read it yet
        self._gone: dict[int, str] = {}  # rank -> why it will not post again

    def meet(self, rank: int, meeting: int, value: object, members: Sequence[int]) -> dict[int, Any]:
        """Post `value` as `rank` and return {rank: value} of all members."""
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            posts = self._posts.setdefault(meeting, {})
            posts[rank] = value
            self._readers.setdefault(meeting, len(members))
            if len(posts) == len(members):
                self._changed.notify_all()
            while len(posts) < len(members):
                missing = [r for r in members if r not in posts]
                gone = [r for r in missing if r in self._gone]
                if gone:
                    raise LostRankError(
                        f"rank {rank} waits in group {self.name!r} for rank {gone[0]}, which {self._gone[gone[0]]}",
                        tuple(gone),
                    )
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._gone[rank] = f"gave up after {self.timeout_s:g} s of waiting for ranks {missing}"
                    self._changed.notify_all()
                    raise LostRankError(
                        f"rank {rank} waited {self.timeout_s:g} s in group {self.name!r} for ranks {missing}, "
                        "which did not call",
                        tuple(missing),
                    )
                self._changed.wait(remaining)
            self._readers[meeting] -= 1
            if self._readers[meeting] == 0:
                del self._posts[meeting], self._readers[meeting]
            return {r: posts[r] for r in members}

    def leave(self, rank: int, reason: str) -> None:
        """Say that `rank` will not post again, and wake whoever waits for it."""
        with self._changed:
            self._gone.setdefault(rank, reason)
            self._changed.notify_all()

    def return_all(self) -> None:
        """Forget meetings and departures, for the next run of the same world."""
        with self._changed:
            self._posts.clear()
            self._readers.clear()
            self._gone.clear()


class LocalTransport:
    """One rank's end of a group of threads; implements `Transport`."""

    def __init__(self, board: Board, rank: int, on_close: Callable[[], None] | None = None) -> None:
        self._board, self._rank, self._on_close = board, rank, on_close
        self._meeting = 0
        self._scratch = Scratch()

    @property
    def name(self) -> str:
        return self._board.name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._board.world_size

    def exchange_counts(self, counts: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        received = torch.zeros_like(counts)
        # A copy, since the caller may write to its counts while a slower rank still reads them.
        for source, theirs in self._meet(counts.clone(), members).items():
            received[source] = theirs[self._rank]
        return received

    def exchange_rows(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        members: Sequence[int] | None = None,
        into_scratch: bool = False,
    ) -> torch.Tensor:
        assert sum(send_counts) == rows.shape[0], (send_counts, rows.shape)
        parts = []
        for source, (theirs, counts) in self._meet((rows, list(send_counts)), members).items():
            assert counts[self._rank] == recv_counts[source], (source, counts, recv_counts)
            start = sum(counts[: self._rank])
            parts.append(theirs[start : start + counts[self._rank]])
        if not into_scratch:
            return torch.cat(parts)
        received = self._scratch.take("received", (sum(recv_counts), *rows.shape[1:]), rows)
        return torch.cat(parts, out=received)

    def rows_to_send(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(shape)  # slower ranks may still read those of the last exchange

    def close(self) -> None:
        self._board.leave(self._rank, "closed its transport")
        self._scratch.clear()
        if self._on_close is not None:
            self._on_close()

    def restart(self) -> None:
        """Count meetings from zero again, for the next run of the same world."""
        self._meeting = 0

    def _meet(self, value: object, members: Sequence[int] | None) -> dict[int, Any]:
        self._meeting += 1
        return self._board.meet(self._rank, self._meeting, value, members or range(self.world_size))
