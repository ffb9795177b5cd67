"""The contract of a transport: what a rank can do with the other ranks of its group.

Shapes: W ranks in the group. Every exchange is a collective: all ranks of the group (or all of `members`) call it in
the same order. `members` narrows an exchange to the ranks listed, in ascending order; the others do not call, and their
rows and counts are zero. It serves scaled-down worlds, where some ranks are gone (specification §2.11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Transport(Protocol):
    """One rank's end of a group.

    Attributes: `name` (of the group, the same on all its ranks), `rank` (0…W−1), `world_size` (W), `broken` (bool, no
    exchange may follow).

    Laws, tested over every implementation: what rank s puts into row d of its counts is row s of what rank d gets;
    rows arrive unchanged, ordered by source rank and then as they were sent; two exchanges never mix; a rank that fails
    or ends turns the wait of the others into a LostRankError; after a LostRankError every further exchange raises one
    that names the same ranks.
    """

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def broken(self) -> bool: ...

    def number(self, members: Sequence[int] | None = None) -> int:
        """Return how many exchanges have been made with exactly these members, None for all: equal on all of them."""
        ...

    def next_layer(self) -> int:
        """Return 0, 1, … at successive calls: the number of a layer, equal on ranks that make the same layers."""
        ...

    def take_turn(self) -> None:
        """Begin a call of this rank, which may have parts that take their turn within it.

        Raises:
            ConstraintError: another thread's call is not over.
        """
        ...

    def end_turn(self) -> None:
        """End what `take_turn` began."""
        ...

    def check_usable(self) -> None:
        """Raise what ended this end of the group, if anything did.

        Raises:
            ConstraintError: it was closed.
            LostRankError: an earlier exchange lost a rank or was left out of step.
        """
        ...

    def break_off(self, reason: str, ranks: tuple[int, ...] | None = None) -> None:
        """Make no exchange any more and let the other ranks know, who get a LostRankError.

        Args:
            reason: follows this rank in a sentence, as in "failed with MemoryError".
            ranks: whose fault it is; None for this one's own.
        """
        ...

    def exchange_counts(self, counts: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        """Send row d of `counts` to rank d; return what every rank sent here.

        Args:
            counts: int64 (W, n), n equal on all ranks.
            members: ranks that take part, ascending; None for all.

        Returns:
            int64 (W, n), row s from rank s.

        Raises:
            LostRankError: a rank failed or ended instead of taking part, now or in an earlier exchange.
        """
        ...

    def last_counts(self) -> torch.Tensor:
        """Return once more what was received in the last `exchange_counts` that ended."""
        ...

    def exchange_rows(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        members: Sequence[int] | None = None,
        into_scratch: bool = False,
    ) -> torch.Tensor:
        """Send the first `send_counts[0]` rows to rank 0, the next to rank 1, and so on; return the rows sent here.

        Args:
            rows: any dtype, (sum(send_counts), …), contiguous. It belongs to the exchange: do not write to it again.
            send_counts, recv_counts: W row counts each; `recv_counts[s]` is what rank s sends here.
            members: ranks that take part, ascending; None for all.
            into_scratch: the result may lie in memory that the next such exchange of this rank overwrites.

        Returns:
            A tensor (sum(recv_counts), …) of the same dtype, ordered by source rank.

        Raises:
            LostRankError: a rank failed or ended instead of taking part, now or in an earlier exchange.
        """
        ...

    def rows_to_send(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of `shape`, with dtype and device of `like`, to be filled and given to exchange_rows.

        Where the other ranks have read the rows when exchange_rows returns, the next call may give the same memory.
        """
        ...

    def close(self) -> None:
        """Give the group back; no exchange may follow."""
        ...
