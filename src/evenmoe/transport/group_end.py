"""What every kind of group keeps for one rank: how many exchanges it has made, and whether it may make another."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from evenmoe.errors import ConstraintError, LostRankError

if TYPE_CHECKING:
    import torch

Members = tuple[int, ...]


class Connection:
    """A connection to other ranks: whoever copies what holds it shares it, and nobody can pickle it."""

    def __copy__(self) -> Connection:
        return self

    def __deepcopy__(self, memo: object) -> Connection:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConstraintError(
            type(self).__name__,
            "an open connection to other ranks",
            "cannot be pickled",
            "pickle the placement, and open the world anew where it is loaded",
        )


class GroupEnd(Connection, ABC):
    """One rank's end of a group; implements `Transport` over `_exchange_counts`, `_exchange_rows` and `_tell`.

    Every exchange has a number, the same on all ranks that take part in it: exchanges of all ranks are counted
    together, and those of each narrower set of `members` by themselves.
    """

    def __init__(self) -> None:
        self._numbers: Counter[Members] = Counter()
        self._layers = 0
        self._turn = threading.RLock()  # an operator's parts take their turn within the operator's
        self._broken: tuple[str, Members] | None = None  # why no exchange may follow, and whose fault it is
        self._closed = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def world_size(self) -> int: ...

    @property
    def broken(self) -> bool:
        """Whether no exchange may follow, for any reason."""
        return self._closed or self._broken is not None

    def number(self, members: Sequence[int] | None = None) -> int:
        """Exchanges made so far with exactly these members, None for all ranks."""
        return self._numbers[self._key(members)]

    def next_layer(self) -> int:
        """Number the layers made on this end of the group, from 0; ranks that make the same layers agree."""
        self._layers += 1
        return self._layers - 1

    def take_turn(self) -> None:
        # One call at a time, since the others' exchanges are paired with this rank's in their order.
        if not self._turn.acquire(blocking=False):
            raise ConstraintError(
                "ep",
                f"group {self.name!r}, in the midst of another call of rank {self.rank}",
                "serves one call of a rank at a time",
                "let the calls of a rank follow each other, or open a group for each of its threads",
            )

    def end_turn(self) -> None:
        self._turn.release()

    def check_usable(self) -> None:
        """Raise what ended this end of the group, if anything did.

        Raises:
            ConstraintError: it was closed.
            LostRankError: an earlier exchange lost a rank or was left out of step.
        """
        if self._closed:
            raise ConstraintError(
                "ep",
                f"group {self.name!r}, which is closed",
                "must be open",
                "make calls before the world is closed, or open another one",
            )
        if self._broken is not None:
            reason, ranks = self._broken
            raise LostRankError(
                f"group {self.name!r} is closed for good on rank {self.rank}: {reason}; open another world", ranks
            )

    def break_off(self, reason: str, ranks: Members | None = None) -> None:
        if not self.broken:
            self._broken = f"rank {self.rank} {reason}", (self.rank,) if ranks is None else ranks
            self._tell(reason, ranks)

    def exchange_counts(self, counts: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        self.check_usable()
        with self._noting_its_end():
            return self._exchange_counts(counts, members)

    @abstractmethod
    def last_counts(self) -> torch.Tensor: ...

    def exchange_rows(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        members: Sequence[int] | None = None,
        into_scratch: bool = False,
    ) -> torch.Tensor:
        self.check_usable()
        with self._noting_its_end():
            return self._exchange_rows(rows, send_counts, recv_counts, members, into_scratch)

    @abstractmethod
    def rows_to_send(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor: ...

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._end()

    @abstractmethod
    def _exchange_counts(self, counts: torch.Tensor, members: Sequence[int] | None) -> torch.Tensor: ...

    @abstractmethod
    def _exchange_rows(
        self,
        rows: torch.Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        members: Sequence[int] | None,
        into_scratch: bool,
    ) -> torch.Tensor: ...

    @abstractmethod
    def _tell(self, reason: str, because_of: Members | None) -> None:
        """Let the other ranks know, without waiting for them, that this one makes no exchange any more."""

    @abstractmethod
    def _end(self) -> None:
        """Give back what the group holds."""

    @property
    def _unsure(self) -> bool:
        """Whether an exchange may have been made that is not counted."""
        return False

    @contextmanager
    def _noting_its_end(self) -> Iterator[None]:
        try:
            yield
        except LostRankError as error:
            self._broken = self._broken or (str(error), error.ranks)
            raise
        except BaseException as error:  # also an interrupt: an exchange that may have been made is not made again
            if self._unsure:
                self.break_off(f"failed with {type(error).__name__} in the midst of an exchange")
            raise

    def _count(self, members: Sequence[int] | None) -> None:
        """An exchange is done: called at once when it is, before anything that may fail."""
        self._numbers[self._key(members)] += 1

    def _key(self, members: Sequence[int] | None) -> Members:
        return () if members is None or len(members) == self.world_size else tuple(members)
