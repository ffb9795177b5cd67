"""A transport over the active ranks, under new numbers: the world of a scaled-down elastic group (§2.11)."""

from __future__ import annotations

from itertools import accumulate

import torch

from evenmoe.transport.transport import Ints, Transport


class RemappedTransport:
    """The active ranks of a group, numbered 0…n−1 by `old_rank_of`; implements `Transport`.

    Only they call; the ranks that are gone need not exist any more.
    """

    def __init__(self, transport: Transport, old_rank_of: Ints) -> None:
        self._transport, self._old_rank_of = transport, list(old_rank_of)
        self._members = sorted(old_rank_of)
        self.name, self.rank = transport.name, self._old_rank_of.index(transport.rank)
        self.world_size = len(self._old_rank_of)

    @property
    def broken(self) -> bool:
        return self._transport.broken

    def number(self, members: Ints | None = None) -> int:
        assert members is None, "a remapped group is not narrowed again"
        return self._transport.number(self._members)

    def next_layer(self) -> int:
        return self._transport.next_layer()

    def take_turn(self) -> None:
        self._transport.take_turn()

    def end_turn(self) -> None:
        self._transport.end_turn()

    def check_usable(self) -> None:
        self._transport.check_usable()

    def break_off(self, reason: str, ranks: tuple[int, ...] | None = None) -> None:
        old = None if ranks is None else tuple(sorted(self._old_rank_of[rank] for rank in ranks))
        self._transport.break_off(reason, old)

    def exchange_counts(self, counts: torch.Tensor, members: Ints | None = None) -> torch.Tensor:
        assert members is None, "a remapped group is not narrowed again"
        full = counts.new_zeros((self._transport.world_size, counts.shape[1]))
        full[self._old_rank_of] = counts
        return self._transport.exchange_counts(full, self._members)[self._old_rank_of]

    def last_counts(self) -> torch.Tensor:
        return self._transport.last_counts()[self._old_rank_of]

    def exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None = None, reuse: bool = False
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

    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        return self._transport.rows_to_send(shape, like)

    def close(self) -> None:
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
