"""`process_group`: the ranks are processes, joined by any torch.distributed backend that has all-to-all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod

import torch
import torch.distributed as dist

from evenmoe.errors import LostRankError
from evenmoe.transport.scratch import Scratch


class ProcessGroupTransport:
    """One rank's end of a torch.distributed process group; implements `Transport`.

    Rows travel as bytes, since backends differ in the dtypes they take (gloo refuses fp8 in collectives).
    """

    def __init__(self, group: dist.ProcessGroup, on_close: Callable[[], None] | None = None) -> None:
        self._group, self._on_close = group, on_close
        self._scratch = Scratch()

    @property
    def name(self) -> str:
        return self._group.group_name

    @property
    def rank(self) -> int:
        return self._group.rank()

    @property
    def world_size(self) -> int:
        return self._group.size()

    def exchange_counts(self, counts: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        each, counts = [1] * self.world_size, counts.contiguous()
        return self._exchange(counts, torch.zeros_like(counts), each, each, members)

    def exchange_rows(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        members: Sequence[int] | None = None,
        into_scratch: bool = False,
    ) -> torch.Tensor:
        shape = (sum(recv_counts), *rows.shape[1:])
        received = self._scratch.take("received", shape, rows) if into_scratch else rows.new_empty(shape)
        if prod(rows.shape[1:]):
            self._exchange(_as_bytes(rows), _as_bytes(received), list(send_counts), list(recv_counts), members)
        return received

    def rows_to_send(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return self._scratch.take("sent", shape, like)

    def close(self) -> None:
        self._scratch.clear()
        if self._on_close is not None:
            self._on_close()

    def _exchange(
        self,
        sent: torch.Tensor,
        received: torch.Tensor,
        send: list[int],
        recv: list[int],
        members: Sequence[int] | None,
    ) -> torch.Tensor:
        with self._naming_lost_ranks():
            if members is None:
                dist.all_to_all_single(received, sent, recv, send, group=self._group)
            else:
                self._exchange_with(members, sent, received, send, recv)
        return received

    def _exchange_with(
        self, members: Sequence[int], sent: torch.Tensor, received: torch.Tensor, send: list[int], recv: list[int]
    ) -> None:
        """Point to point, since the ranks that are gone cannot join a collective of the whole group."""
        outgoing, incoming = _split(sent, send), _split(received, recv)
        incoming[self.rank].copy_(outgoing[self.rank])
        work = []
        for peer in members:
            if peer != self.rank and recv[peer]:
                work.append(dist.P2POp(dist.irecv, incoming[peer], group=self._group, group_peer=peer))
            if peer != self.rank and send[peer]:
                work.append(dist.P2POp(dist.isend, outgoing[peer], group=self._group, group_peer=peer))
        for request in dist.batch_isend_irecv(work) if work else []:
            request.wait()

    @contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LostRankError(
                f"rank {self.rank} lost another rank of group {self.name!r} ({self.world_size} ranks) during an "
                f"exchange: {reason}"
            ) from error


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
