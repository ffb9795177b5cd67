"""What a rank can do with the other ranks of its group, what every kind of group keeps for it, and groups by name.

Shapes: W ranks in the group. Every exchange is a collective: all ranks of the group (or all of `members`) call it in
the same order. `members` narrows an exchange to the ranks listed, in ascending order; the others do not call, and their
rows and counts are zero. It serves scaled-down worlds, where some ranks are gone (specification §2.11).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.errors import ConstraintError, LostRankError
from evenmoe.transport.packets import Views, row_bytes
from evenmoe.transport.pending import Setups
from evenmoe.transport.pool import LARGE, Pool
from evenmoe.transport.segment import Octets

Members = tuple[int, ...]
Ints: TypeAlias = Sequence[int]
Counted: TypeAlias = npt.NDArray[np.int64]


class Transport(ABC):
    """One rank's end of a group; a kind of group says how counts and rows are exchanged, and what ends it.

    Properties, tested over every implementation: what rank s puts into row d of its counts is row s of what rank d
    gets; rows arrive unchanged, ordered by source rank and then as they were sent; two exchanges never mix; a rank that
    fails or ends turns the wait of the others into a LostRankError; after a LostRankError every further exchange raises
    one that names the same ranks.

    Every exchange has a number, the same on all ranks that take part in it: exchanges of all ranks are counted
    together, and those of each narrower set of `members` by themselves. Whoever copies what holds an end shares it,
    since it is a connection to other ranks; nobody can pickle it.

    Attributes: `name` (of the group, the same on all its ranks), `rank` (0…W−1), `world_size` (W); `kind`, the name of
    the implementation, and `description`, how the ranks exchange, to be read; `setups`, the exchanges under way that
    no call waits for.
    """

    kind = description = ""

    def __init__(self, name: str, rank: int, world_size: int) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self._numbers: Counter[Members] = Counter()
        self._layers = 0
        self.setups = Setups()
        self._pool = Pool()
        self._turn = threading.RLock()  # an operator's parts take their turn within the operator's
        self._broken: tuple[str, Members] | None = None  # why no exchange may follow, and whose fault it is
        self._closed = False

    def __copy__(self) -> Transport:
        return self

    def __deepcopy__(self, memo: object) -> Transport:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        value, rule = "an open connection to other ranks", "cannot be pickled"
        fix = "pickle the placement, and open the world anew where it is loaded"
        raise ConstraintError(type(self).__name__, value, rule, fix)

    @property
    def broken(self) -> bool:
        """Whether no exchange may follow, for any reason."""
        return self._closed or self._broken is not None

    def number(self, members: Ints | None = None) -> int:
        """Return how many exchanges have been made with exactly these members, None for all: equal on all of them."""
        return self._numbers[() if members is None else self._key(members)]

    def next_layer(self) -> int:
        """Return 0, 1, … at successive calls: the number of a layer, equal on ranks that make the same layers."""
        self._layers += 1
        return self._layers - 1

    def take_turn(self) -> None:
        """Begin a call of this rank, which may have parts that take their turn within it, behind all that is under way.

        Raises:
            ConstraintError: another thread's call is not over.
        """
        self.setups.wait()
        # One call at a time, since the others' exchanges are paired with this rank's in their order.
        if not self._turn.acquire(blocking=False):
            value = f"group {self.name!r}, in the midst of another call of rank {self.rank}"
            fix = "let the calls of a rank follow each other, or open a group for each of its threads"
            raise ConstraintError("ep", value, "serves one call of a rank at a time", fix)

    def end_turn(self) -> None:
        """End what `take_turn` began."""
        self._turn.release()

    def check_usable(self) -> None:
        """Raise what ended this end of the group, if anything did.

        Raises:
            ConstraintError: it was closed.
            LostRankError: an earlier exchange lost a rank or was left out of step.
        """
        if self._closed:
            value, fix = (
                f"group {self.name!r}, which is closed",
                "make calls before the world is closed, or open another one",
            )
            raise ConstraintError("ep", value, "must be open", fix)
        if self._broken is not None:
            reason, ranks = self._broken
            raise LostRankError(
                f"group {self.name!r} is closed for good on rank {self.rank}: {reason}; open another world", ranks
            )

    def break_off(self, reason: str, ranks: Members | None = None) -> None:
        """Make no exchange any more and let the other ranks know, who get a LostRankError.

        Args:
            reason: follows this rank in a sentence, as in "failed with MemoryError".
            ranks: whose fault it is; None for this one's own.
        """
        if not self.broken:
            self._broken = f"rank {self.rank} {reason}", (self.rank,) if ranks is None else ranks
            self._tell(reason, ranks)

    def exchange_counts(self, counts: torch.Tensor, members: Ints | None = None) -> torch.Tensor:
        """Send row d of `counts` to rank d; return what every rank sent here.

        Args:
            counts: int64 (W, n), n equal on all ranks.
            members: ranks that take part, ascending; None for all.

        Returns:
            int64 (W, n), row s from rank s.

        Raises:
            LostRankError: a rank failed or ended instead of taking part, now or in an earlier exchange.
        """
        if self._closed or self._broken is not None:
            self.check_usable()
        try:
            return self._exchange_counts(counts, members)
        except BaseException as error:
            self._note_end(error)
            raise

    @abstractmethod
    def last_counts(self) -> torch.Tensor:
        """Return once more what was received in the last `exchange_counts` that ended."""

    def exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None = None, reuse: bool = False
    ) -> torch.Tensor:
        """Send the first `send_counts[0]` rows to rank 0, the next to rank 1, and so on; return the rows sent here.

        Args:
            rows: any dtype, (sum(send_counts), …), contiguous. It belongs to the exchange: do not write to it again.
            send_counts, recv_counts: W row counts each; `recv_counts[s]` is what rank s sends here.
            members: ranks that take part, ascending; None for all.
            reuse: the result may lie in memory that the next such exchange of this rank overwrites.

        Returns:
            A tensor (sum(recv_counts), …) of the same dtype, ordered by source rank.

        Raises:
            LostRankError: a rank failed or ended instead of taking part, now or in an earlier exchange.
        """
        if self._closed or self._broken is not None:
            self.check_usable()
        try:
            return self._exchange_rows(rows, send_counts, recv_counts, members, reuse)
        except BaseException as error:
            self._note_end(error)
            raise

    def shows_rows(self, device: torch.device) -> bool:
        """Whether ranks can read each other's rows on `device` where they lie, as `exchange_views` lets them."""
        return False

    def last_views(self) -> Views:
        """Return once more what was received in the last `exchange_views` that ended; valid until `end_reading`."""
        raise NotImplementedError(f"{type(self).__name__} does not show rows")

    def exchange_views(
        self, rows: torch.Tensor, message: Octets, lengths: Ints | Counted, members: Ints | None = None
    ) -> Views:
        """Show `rows` to the other ranks and send each a message; return what they show and send.

        What is returned must not be written to, and may be read until `end_reading`, which has to be called before the
        caller may write to `rows` again.

        Args:
            rows: any dtype, (N, …), contiguous, on a device that `shows_rows`; N may differ between ranks.
            message: uint8 (any,), those for all ranks, one behind the other. lengths: W of them, in bytes.
            members: ranks that take part, ascending; None for all.

        Raises:
            LostRankError: a rank failed or ended instead of taking part, now or in an earlier exchange.
        """
        if self._closed or self._broken is not None:
            self.check_usable()
        try:
            return self._exchange_views(rows, message, np.asarray(lengths, np.int64), members)
        except BaseException as error:
            self._note_end(error)
            raise

    def stop_reading(self) -> None:
        """Say that what the others have shown is not read any more, without waiting for anybody.

        Raises:
            LostRankError: a rank that showed its rows has stopped since, so that what was read may not be what it
                showed.
        """
        try:
            self._stop_reading()
        except BaseException as error:
            self._note_end(error)
            raise

    def end_reading(self) -> None:
        """Say that what the others have shown is not read any more, and wait until they do not read this rank's rows.

        It does nothing if nothing is being read.

        Raises:
            LostRankError: a rank that showed its rows has stopped since, so that what was read may not be what it
                showed; or one does not end its reading.
        """
        try:
            self._end_reading()
        except BaseException as error:
            self._note_end(error)
            raise

    def new_rows(self, shape: tuple[int, ...], like: torch.Tensor, filled: int | None = None) -> torch.Tensor | None:
        """A tensor of `shape`, with dtype and device of `like`, for rows that the caller is to get.

        The first `filled` rows are not initialized, all others are zeros; none is initialized if that is None. It lies
        where other ranks can read it, if there is such memory, or else in memory that is used again. None where no
        memory is better suited than any other.
        """
        if like.device.type != "cpu" or prod(shape) * like.element_size() < LARGE:
            return None
        return self._pool.take(shape, like.dtype, None if filled is None else filled * row_bytes(shape, like))

    @abstractmethod
    def rows_to_send(self, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor of `shape`, with dtype and device of `like`, to be filled and given to exchange_rows.

        Where the other ranks have read the rows when exchange_rows returns, the next call may give the same memory.
        """

    def close(self) -> None:
        """Give the group back; no exchange may follow."""
        if not self._closed:
            self._closed = True
            self._end()

    @abstractmethod
    def _exchange_counts(self, counts: torch.Tensor, members: Ints | None) -> torch.Tensor: ...

    @abstractmethod
    def _exchange_rows(
        self, rows: torch.Tensor, send_counts: Ints, recv_counts: Ints, members: Ints | None, reuse: bool
    ) -> torch.Tensor: ...

    def _exchange_views(self, rows: torch.Tensor, message: Octets, lengths: Counted, members: Ints | None) -> Views:
        raise NotImplementedError(f"{type(self).__name__} does not show rows")

    def _stop_reading(self) -> None:  # noqa: B027 (nothing is read where nothing is shown)
        pass

    def _end_reading(self) -> None:
        self._stop_reading()

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

    def _note_end(self, error: BaseException) -> None:
        """What an error in an exchange means for those to come; an exchange that may have been made is not repeated."""
        if isinstance(error, LostRankError):
            self._broken = self._broken or (str(error), error.ranks)
        elif self._unsure:  # also after an interrupt
            self.break_off(f"failed with {type(error).__name__} in the midst of an exchange")

    def _count(self, members: Ints | None) -> None:
        """An exchange is done: called at once when it is, before anything that may fail."""
        self._numbers[() if members is None else self._key(members)] += 1

    def _key(self, members: Ints) -> Members:
        return () if len(members) == self.world_size else tuple(members)


class Buffers:
    """Buffers of one rank's transport, by use; each is as large as the largest tensor taken from it, and kept.

    On a CPU a fresh 58 MB result costs 28 ms of page faults, more than the copy into it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, use: str, shape: Ints, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor of `shape`, dtype and device of `like`, valid until the same use is taken again.

        >>> buffers = Buffers()
        >>> first = buffers.take("sent", (2, 3), torch.zeros(1))
        >>> buffers.take("sent", (3, 1), torch.zeros(1)).data_ptr() == first.data_ptr()
        True
        """
        if like.device.type != "cpu":  # other devices' allocators keep memory by themselves, and know their streams
            return like.new_empty(shape)
        size = prod(shape) * like.element_size()
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # else it could be written in inference mode only
                # A quarter more, since loads drift.
                buffer = self._buffers[use] = torch.empty(size + size // 4, dtype=torch.uint8)
        return buffer[:size].view(like.dtype).view(*shape)

    def clear(self) -> None:
        self._buffers.clear()


_open: dict[tuple[str, int], Transport] = {}  # by group name and rank, as Ascend's operators are given names
_lock = threading.Lock()


def register(transport: Transport) -> None:
    """Make `transport` known under its group's name and its rank; the ranks of a local world share the name."""
    with _lock:
        _open[transport.name, transport.rank] = transport


def unregister(transport: Transport) -> None:
    with _lock:
        _open.pop((transport.name, transport.rank), None)


def find_transport(argument: str, name: str, rank: int, world_size: int) -> Transport:
    """The transport of one rank of a named group.

    Raises:
        ConstraintError: no such group is open here, or it has another size.
    """
    transport = _open.get((name, rank))
    if transport is None:
        known = sorted({group for group, _ in _open})
        rule = f"must name an open group that this rank belongs to; open are {known or 'none'}"
        fix = "open a world with evenmoe.local_world or evenmoe.process_world, and use its groups' names"
        raise ConstraintError(argument, f"{name!r} (rank {rank})", rule, fix)
    if transport.world_size != world_size:
        value, rule = (
            f"{name!r} with {transport.world_size} ranks",
            f"must have the {world_size} ranks that the call names",
        )
        raise ConstraintError(argument, value, rule, "pass the world size of the group")
    return transport
