"""`process_group`: the ranks are processes, joined by any torch.distributed backend that has all-to-all.

And `RemappedTransport`: the active ranks of any group under new numbers, the world of a scaled-down elastic group
(§2.11).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import torch
import torch.distributed as dist

from evenmoe.errors import LostRankError
from evenmoe.transport.mesh import LastWord, Mesh
from evenmoe.transport.packets import Views
from evenmoe.transport.segment import Octets
from evenmoe.transport.transport import Buffers, Counted, Ints, Members, Transport

_GRACE_S = 1.0  # after a failed exchange, for a rank to be seen to have stopped; 0.12 s sufficed in 150 kills


class ProcessGroupTransport(Transport):
    """One rank's end of a torch.distributed process group.

    Rows travel as bytes, since backends differ in the dtypes they take (gloo takes no fp8 in collectives).

    Args:
        group: the group.
        mesh: connections to its processes, by which lost ranks are known; None to leave them unnamed.
        give_up: closes the group's connections, so that nobody waits for this rank; None if the group is not ours.
        on_close: called by `close`, before the group is given up.
        timeout_s: the group's own, which tells a time-out from an ended connection.
        standalone: whether torch.distributed's own world does not know the group.
    """

    kind, description = "process_group", "torch.distributed"

    def __init__(
        self,
        group: dist.ProcessGroup,
        mesh: Mesh | None = None,
        give_up: Callable[[dist.ProcessGroup], None] | None = None,
        on_close: Callable[[], None] | None = None,
        timeout_s: float | None = None,
        standalone: bool = False,
    ) -> None:
        super().__init__(group.group_name, group.rank(), group.size())
        self._group: dist.ProcessGroup | None = group
        self._mesh, self._give_up, self._on_close, self._timeout_s = mesh, give_up, on_close, timeout_s
        self._standalone = standalone
        self._pending: list[dist.Work | None] | None = []  # None while an exchange is being begun
        self._buffers = Buffers()
        self._last_counts = torch.zeros((0, 0), dtype=torch.int64)

    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        return self._buffers.take("sent", shape, like)

    def last_counts(self) -> torch.Tensor:
        return self._last_counts

    def _exchange_counts(self, counts: torch.Tensor, members: Ints | None) -> torch.Tensor:
        each, counts = [1] * self.world_size, counts.contiguous()
        self._last_counts = torch.zeros_like(counts)
        return self._exchange(counts, self._last_counts, each, each, members)

    def _exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None, reuse: bool
    ) -> torch.Tensor:
        shape = (sum(recv_counts), *rows.shape[1:])
        received = self._buffers.take("received", shape, rows) if reuse else rows.new_empty(shape)
        if prod(rows.shape[1:]):
            self._exchange(_as_bytes(rows), _as_bytes(received), list(send_counts), list(recv_counts), members)
        else:
            self._count(members)
        return received

    def _exchange(
        self, sent: torch.Tensor, received: torch.Tensor, send: list[int], recv: list[int], members: Ints | None
    ) -> torch.Tensor:
        start = time.monotonic()
        failure = self._attempt(sent, received, send, recv, members)
        if failure is not None:
            raise self._lost(failure, start)
        return received

    def _attempt(
        self, sent: torch.Tensor, received: torch.Tensor, send: list[int], recv: list[int], members: Ints | None
    ) -> str | None:
        """Exchange; return what the backend says when it fails, and nothing that keeps the group alive."""
        number = self.number(members)
        try:
            self._pending = None
            if members is None:
                self._pending = [dist.all_to_all_single(received, sent, recv, send, group=self._group, async_op=True)]
            else:
                self._pending = self._begin_with(members, sent, received, send, recv)
            _wait(self._pending)
            self._count(members)
        except RuntimeError as error:
            begun, self._pending = self._pending is not None or members is not None, []
            if not begun and not isinstance(error, dist.DistError):
                raise  # torch rejected the call before anything was sent
            return _first_line(error)
        except Exception:  # of this rank alone: what has begun is ended all the same, and the error goes on from there
            _wait(self._pending or [])
            if self._pending and self.number(members) == number:
                self._count(members)
            self._pending = []
            raise
        self._pending = []
        return None

    def _begin_with(
        self, members: Ints, sent: torch.Tensor, received: torch.Tensor, send: list[int], recv: list[int]
    ) -> list[dist.Work | None]:
        """Point to point, since the ranks that are gone cannot join a collective of the whole group."""
        outgoing, incoming = _split(sent, send), _split(received, recv)
        incoming[self.rank].copy_(outgoing[self.rank])
        if self._standalone:  # of which torch.distributed's functions for pairs of ranks know nothing
            assert self._group is not None
            others = [peer for peer in members if peer != self.rank]
            begun = [self._group.recv([incoming[peer]], peer, 0) for peer in others if recv[peer]]
            return [*begun, *(self._group.send([outgoing[peer]], peer, 0) for peer in others if send[peer])]
        work = []
        for peer in members:
            if peer != self.rank and recv[peer]:
                work.append(dist.P2POp(dist.irecv, incoming[peer], group=self._group, group_peer=peer))
            if peer != self.rank and send[peer]:
                work.append(dist.P2POp(dist.isend, outgoing[peer], group=self._group, group_peer=peer))
        return list(dist.batch_isend_irecv(work)) if work else []

    def _lost(self, failure: str, start: float) -> LostRankError:
        """The error of a failed exchange, told to the other ranks: they need not wait for this one."""
        # Nine tenths, since the backend's clock is another one and began a little later or earlier.
        timed_out = self._timeout_s is not None and time.monotonic() - start >= 0.9 * self._timeout_s
        # First of all, so that ranks that wait for this one hear of it now, and nobody takes its silence for the cause.
        self._stop(LastWord("lost a rank", by_itself=False, timed_out=timed_out))
        stopped = {} if self._mesh is None else self._mesh.stopped(_GRACE_S, all_silent=timed_out)
        ranks = tuple(stopped)
        if ranks:
            text = f"lost rank {_listed(ranks)} of group {self.name!r}, which {stopped[ranks[0]].reason}"
        else:
            text = f"lost a rank of group {self.name!r}; which of the {self.world_size} cannot be told"
        error = LostRankError(f"rank {self.rank} {text} ({failure})", ranks)
        self._stop(LastWord(text, by_itself=False, because_of=ranks))
        return error

    @property
    def _unsure(self) -> bool:
        return self._pending is None or len(self._pending) > 0

    def _tell(self, reason: str, because_of: Members | None) -> None:
        self._stop(LastWord(reason, because_of is None, because_of or ()))

    def _stop(self, word: LastWord) -> None:
        if self._mesh is not None:
            self._mesh.say(word)
        if self._give_up is None or self._group is None or self._pending is None:
            return
        group, self._group = self._group, None
        pending, self._pending = self._pending, []  # which would keep the group alive, and with it its connections
        if pending:  # the backend would wait for the end of an exchange that is under way, so let another thread
            threading.Thread(target=_give_up_later, args=(self._give_up, group, pending), daemon=True).start()
        else:
            self._give_up(group)

    def _end(self) -> None:
        self._buffers.clear()
        if self._on_close is not None:
            self._on_close()
        self._stop(LastWord("closed its transport"))
        if self._mesh is not None:
            self._mesh.close()


def _give_up_later(
    give_up: Callable[[dist.ProcessGroup], None], group: dist.ProcessGroup, pending: Sequence[dist.Work | None]
) -> None:
    with suppress(RuntimeError):
        _wait(pending)
    give_up(group)


def _wait(pending: Sequence[dist.Work | None]) -> None:
    for request in pending:
        assert request is not None, "a rank of the group called"
        request.wait()


def _first_line(error: Exception) -> str:
    """What happened, without gloo's source file and its advice, which says to look at the other ranks' logs."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^\[[^\]]*\] ", "", text).split(". This is typically")[0]


def _listed(ranks: Ints) -> str:
    return ", ".join(map(str, ranks))


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 (rows, bytes per row)."""
    # The strides of a contiguous tensor may be anything where a dimension is 0 or 1, and view(dtype) minds them.
    count, width = rows.shape[0], prod(rows.shape[1:])
    return rows.as_strided((count, width), (width, 1)).view(torch.uint8)


def _split(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    return [rows[start:stop] for start, stop in pairwise(edges)]


class RemappedTransport(Transport):
    """The active ranks of a group, numbered 0…n−1 by `old_rank_of`; what ends the group ends it for them.

    Only they call; the ranks that are gone need not exist any more.
    """

    def __init__(self, transport: Transport, old_rank_of: Ints) -> None:
        self._transport, self._old_rank_of = transport, list(old_rank_of)
        self._members = sorted(old_rank_of)
        super().__init__(transport.name, self._old_rank_of.index(transport.rank), len(self._old_rank_of))
        self.kind, self.description = transport.kind, transport.description

    @property
    def broken(self) -> bool:
        return self._transport.broken

    def number(self, members: Ints | None = None) -> int:
        assert members is None, "a remapped group is not narrowed again"
        return self._transport.number(self._members)

    def check_usable(self) -> None:
        self._transport.check_usable()

    def last_counts(self) -> torch.Tensor:
        return self._transport.last_counts()[self._old_rank_of]

    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        return self._transport.rows_to_send(shape, like)

    def shows_rows(self, device: torch.device) -> bool:
        return self._transport.shows_rows(device)

    def new_rows(self, shape: tuple[int, ...], like: torch.Tensor, filled: int | None = None) -> torch.Tensor | None:
        return self._transport.new_rows(shape, like, filled)

    def last_views(self) -> Views:
        views = self._transport.last_views()
        old = np.array(self._old_rank_of)
        return Views(views.rows[old], views.counts[old], views.messages[old], views.lengths[old], views.held)

    def _exchange_views(self, rows: torch.Tensor, message: Octets, lengths: Counted, members: Ints | None) -> Views:
        assert members is None, "a remapped group is not narrowed again"
        starts = lengths.cumsum() - lengths
        full = np.zeros(self._transport.world_size, np.int64)
        full[self._old_rank_of] = lengths
        by_old_rank = [int(new) for new in np.argsort(self._old_rank_of)]
        pieces = [message[starts[new] : starts[new] + lengths[new]] for new in by_old_rank]
        self._transport.exchange_views(rows, np.concatenate(pieces), full, self._members)
        return self.last_views()

    def _stop_reading(self) -> None:
        self._transport.stop_reading()

    def _end_reading(self) -> None:
        self._transport.end_reading()

    def _exchange_counts(self, counts: torch.Tensor, members: Ints | None) -> torch.Tensor:
        assert members is None, "a remapped group is not narrowed again"
        full = counts.new_zeros((self._transport.world_size, counts.shape[1]))
        full[self._old_rank_of] = counts
        return self._transport.exchange_counts(full, self._members)[self._old_rank_of]

    def _exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None, reuse: bool
    ) -> torch.Tensor:
        assert members is None, "a remapped group is not narrowed again"
        by_old_rank = self._reordered(
            rows, send_counts, sorted(range(len(send_counts)), key=self._old_rank_of.__getitem__)
        )
        received = self._transport.exchange_rows(
            by_old_rank, self._spread(send_counts), self._spread(recv_counts), self._members, reuse
        )
        in_old_order = [recv_counts[self._old_rank_of.index(old)] for old in self._members]
        return self._reordered(received, in_old_order, [self._members.index(old) for old in self._old_rank_of])

    def _tell(self, reason: str, because_of: Members | None) -> None:
        old = None if because_of is None else tuple(sorted(self._old_rank_of[rank] for rank in because_of))
        self._transport.break_off(reason, old)

    def _end(self) -> None:
        self._transport.close()

    def _spread(self, counts: Ints) -> list[int]:
        """Counts by new rank -> counts by old rank, zero for ranks that are gone."""
        full = [0] * self._transport.world_size
        for new, old in enumerate(self._old_rank_of):
            full[old] = counts[new]
        return full

    @staticmethod
    def _reordered(rows: torch.Tensor, counts: Ints, order: Ints) -> torch.Tensor:
        """Blocks of `counts` rows, put into `order`."""
        if list(order) == sorted(order):
            return rows
        stops = list(accumulate(counts))
        return torch.cat([rows[stops[block] - counts[block] : stops[block]] for block in order])
