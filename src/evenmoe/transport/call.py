"""One rank's part in a collective call, and what becomes of it when something fails there.

A call is a header that all ranks compare (see `agreement`), and rows for every rank. Whatever is raised on a rank in
between, the exchange that the others wait for is made all the same, with a failure in it: they raise an error that
names the rank, and all ranks are in step for the next call. Only an interrupt does not wait for others: it breaks the
group off, for good.

Where ranks can read each other's rows, header and rows are one exchange: a rank shows all of its rows, and tells every
other which of them are for it (`messages`). Else the header comes first, with the sizes of the packets of rows that
follow (`blocks`).

Shapes: W ranks, H width of a row, N rows of a packet, M numbers of a packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from evenmoe.errors import LostRankError, RankDisagreementError
from evenmoe.transport import agreement, messages
from evenmoe.transport.agreement import UNKNOWN, Header
from evenmoe.transport.blocks import Blocks, failure_in, fill, heads_and_numbers, heads_for
from evenmoe.transport.packets import Incoming, Outgoing, Views
from evenmoe.transport.transport import Transport

_MESSAGE_WORDS = 4096  # counts sent to all ranks together: 32 KiB, a latency-bound message on any link
_FEW = 64  # counts for each rank that travel with the first header, however many ranks there are
# What the others wait for: the exchange that comes next; not known, since this rank has not understood their headers;
# nothing more.
_PENDING, _UNKNOWN, _DONE = range(3)
_NO_ROWS, _CPU = torch.empty(0), torch.device("cpu")
_COUNTS = agreement.HEADER + 2  # where counts begin, behind the numbers and the rows of the packet that follows


@dataclass(frozen=True)
class _Packets:
    """The packets that the others wait for, known to all ranks once they have agreed.

    Attributes:
        wire_shape: of a row as it travels: one of no bytes is a single element, as a head counts in rows.
        received: None where the ranks read each other's rows.
    """

    outgoing: Outgoing
    wire_shape: tuple[int, ...]
    sent: Blocks | None
    received: Blocks | None


@dataclass(frozen=True)
class _Announced:
    """What a rank said in its message: the header, whether nothing follows, the packet, and counts that did not fit."""

    header: Header
    words: agreement.Words
    last: bool = False
    outgoing: Outgoing | None = None
    rest: torch.Tensor | None = None


class GroupCall:
    """One rank's part in one collective call of one group: `agree` as often as it takes, then `send`; or, where
    something must be known before rows can be sent, `agree` with what goes out and then `exchange`.

    Attributes: `group`, and `number`, that of the exchange which begins the call, by which all ranks know it.

    Args:
        group: the group.
        operator: under whose name the ranks agree.
        rows: the tensor that is to travel, on whose device the ranks exchange; anything else if it is missing.
        heard: whether the others would hear of a failure now; see `narrow`.
    """

    def __init__(self, group: Transport, operator: str, rows: object = None, *, heard: bool = True) -> None:
        self.group, self._operator, self._heard = group, operator, heard
        self._device = rows.device if isinstance(rows, torch.Tensor) and rows.device.type != "meta" else _CPU
        self.number = self._next = group.number()  # of the exchange that the others wait for
        self._shows_rows = group.shows_rows(self._device)
        self._stage = _PENDING
        self._announced: _Announced | None = None
        self._packets: _Packets | None = None  # once agreed
        self._rest: torch.Tensor | None = None  # counts that did not fit beside the header
        self._fitting = max(_FEW, _MESSAGE_WORDS // group.world_size)  # counts beside it, on all ranks as many
        self._agreed: tuple[Header, agreement.Words] | None = None  # this rank's header and those of all, the last

    def narrow(self, group: Transport) -> None:
        """Go on with the ranks that are left, which wait for this one from now on."""
        self.group, self._heard, self.number = group, True, group.number()
        self._next, self._fitting = self.number, max(_FEW, _MESSAGE_WORDS // group.world_size)

    def send(
        self,
        header: Header,
        counts: torch.Tensor,
        outgoing: Outgoing,
        rows: torch.Tensor,
        index: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        dispatch: int = UNKNOWN,
    ) -> tuple[torch.Tensor, Incoming]:
        """Agree on a header, and exchange counts and rows; in one exchange where ranks read each other's rows.

        Args and errors are those of `agree` and of `exchange`.

        Returns:
            int64 (W, n), what every rank counts for this one; and what was sent here.
        """
        if not self._shows_rows:
            told = self.agree(header, counts, outgoing, dispatch)
            return told, self.exchange(rows, index, numbers)
        self._packets = _Packets(outgoing, outgoing.shape, None, None)
        return self._show(header, dispatch, counts.numpy(), rows, index, numbers)

    def agree(
        self, header: Header, counts: torch.Tensor, outgoing: Outgoing | None = None, dispatch: int = UNKNOWN
    ) -> torch.Tensor:
        """Exchange `counts` between ranks that agree on a header; raise the same error on every rank if they do not.

        Args:
            header: the operator and its sizes.
            counts: int64 (W, n); row d goes to rank d.
            outgoing: the packet that follows. None if the ranks have to agree once more before.
            dispatch: which dispatch the call is about, if its operator is about one.

        Returns:
            int64 (W, n), row s from rank s.

        Raises:
            RankDisagreementError: ranks make different calls or call with different sizes, or one of them failed.
            LostRankError: a rank is gone, or out of step.
        """
        if self._shows_rows:
            if outgoing is not None:
                self._packets = _Packets(outgoing, outgoing.shape, None, None)
            return self._show(header, dispatch, counts.numpy())[0]
        self._operator = header.operator
        fitting, width = self._fitting, counts.shape[1]
        rest = counts[:, fitting:].contiguous() if width > fitting else None
        words = self._words(header, dispatch)
        message = np.zeros((self.group.world_size, _COUNTS + fitting), np.int64)
        message[:, : agreement.HEADER] = words
        if outgoing is not None:
            message[:, agreement.HEADER], message[:, agreement.HEADER + 1] = outgoing.numbers, outgoing.rows
        if width:
            message[:, _COUNTS : _COUNTS + width] = (counts if rest is None else counts[:, :fitting]).cpu().numpy()
        self._announced = _Announced(header, words, outgoing=outgoing, rest=rest)
        message = torch.from_numpy(message).to(self._device)
        self._stage = _UNKNOWN
        received = self.group.exchange_counts(message)
        self._understand(received.cpu().numpy(), self._announced)
        theirs = received[:, _COUNTS : _COUNTS + min(width, fitting)]
        return theirs if rest is None else torch.cat([theirs, self._exchange_rest(rest)], dim=1)

    def exchange(
        self, rows: torch.Tensor, index: torch.Tensor | None = None, numbers: torch.Tensor | None = None
    ) -> Incoming:
        """Send the packets that `agree` announced, and return those sent here.

        Args:
            rows: (any, *shape) of the announced dtype.
            index: integers (N,), which of `rows` to send, by destination. None for all of them, in their order.
            numbers: int32 (M,), by destination.

        Raises:
            RankDisagreementError: the call failed on another rank; the same on every rank but that one.
            LostRankError: a rank is gone, or out of step.
        """
        packets = self._packets
        assert packets is not None, "the ranks have agreed"
        if self._shows_rows:
            assert self._agreed is not None, "the ranks have agreed"
            nothing = np.zeros((self.group.world_size, 0), np.int64)
            return self._show(self._agreed[0], UNKNOWN, nothing, rows, index, numbers)[1]
        if index is None:
            index = torch.arange(len(rows), device=rows.device)
        assert len(index) == sum(packets.outgoing.rows), (len(index), packets.outgoing.rows)
        shape = packets.outgoing.shape
        if prod(shape):
            return self._exchange_packets(packets, rows, index, numbers)
        incoming = self._exchange_packets(packets, rows.new_zeros((len(rows), *packets.wire_shape)), index, numbers)
        return replace(incoming, like=rows.new_empty((len(incoming.like), *shape)))

    def finish(self) -> None:
        """End the reading of what was received, and wait for those who read rows of this rank where they lie.

        Raises:
            LostRankError: a rank that is being read from has stopped, or one that reads does not end.
        """
        self.group.end_reading()

    def stop_reading(self) -> None:
        """Let the others write to what this rank was reading, before it tells them what has failed."""
        # What they have told is still needed where this rank has not understood it.
        if self._stage != _UNKNOWN and not self.group.broken:
            with suppress(LostRankError):  # the caller's own error comes first
                self.group.stop_reading()

    def needs(self, gradients: str) -> bool:
        """Whether some rank needs those gradients, so that all of them record; told by the last header."""
        assert self._agreed is not None, "the ranks have agreed"
        return agreement.needed(*self._agreed, gradients)

    def fail(self, error: BaseException) -> None:
        """Let the ranks that wait for this one know of `error`, and be in step with them again if that can be."""
        group = self.group
        if not self._heard or group.broken:
            return
        if not isinstance(error, Exception):
            group.break_off(f"was ended by {type(error).__name__} in the midst of {self._operator}")
            return
        if isinstance(error, LostRankError):  # of another group, without which this rank cannot go on
            group.break_off(f"stopped in {self._operator}: {error}")
            return
        try:
            self._tell_of(error)
            group.end_reading()
        except (LostRankError, RankDisagreementError):
            with suppress(LostRankError):  # the caller's own error comes first
                group.end_reading()
        except BaseException as another:  # whatever it is, the others must not wait for this rank
            group.break_off(f"failed with {type(another).__name__} in the midst of {self._operator}")

    def _tell_of(self, error: Exception) -> None:
        """Make the exchange that the others wait for, if any, with `error` in it."""
        group = self.group
        exchanged = group.number() != self._next  # though this rank had not got round to noting it
        if self._stage == _DONE or (exchanged and self._stage == _PENDING and self._rest is None):
            return  # nothing is waited for, or an inner part of the call has told the others
        if exchanged and self._stage == _UNKNOWN:
            assert self._announced is not None
            if self._shows_rows:
                self._hear(group.last_views(), self._announced)
            else:
                self._understand(group.last_counts().cpu().numpy(), self._announced)
        elif exchanged:
            self._next, self._rest = self._next + 1, None
        if self._stage == _DONE:
            return
        if self._rest is not None:
            self._exchange_rest(self._rest)
        words = agreement.failed_header(self._next, self._operator, error)
        if self._shows_rows:
            message, lengths = messages.pack(words, np.zeros((group.world_size, 0), np.int64))
            group.exchange_views(_NO_ROWS, message, lengths)
        elif self._packets is None:
            message = np.zeros((group.world_size, _COUNTS + self._fitting), np.int64)
            message[:, : agreement.HEADER] = words
            group.exchange_counts(torch.from_numpy(message).to(self._device))
        else:
            self._exchange_packets(self._packets, error=error)
        self._stage = _DONE

    def _words(self, header: Header, dispatch: int) -> agreement.Words:
        """What this rank says in the exchange that comes next."""
        words = header.words.copy()
        words[0] = self._next
        if header.dispatch_word:
            words[header.dispatch_word] = dispatch
        return words

    def _exchange_rest(self, rest: torch.Tensor) -> torch.Tensor:
        received = self.group.exchange_counts(rest)
        self._next, self._rest = self._next + 1, None
        return received

    # Where ranks read each other's rows ---------------------------------------------------------------------------

    def _show(
        self,
        header: Header,
        dispatch: int,
        counts: agreement.Words,
        rows: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Incoming]:
        """Tell all ranks the header, the counts and which of `rows` are for them; without rows, more will follow."""
        self._operator, words = header.operator, self._words(header, dispatch)
        last = rows is not None
        if rows is None:
            rows, (message, lengths) = _NO_ROWS, messages.pack(words, counts)
        else:
            assert self._packets is not None, "what goes out is known"
            outgoing = self._packets.outgoing
            which = np.arange(rows.shape[0]) if index is None else index.numpy()
            along = messages.NO_NUMBERS if numbers is None else numbers.contiguous().numpy().reshape(-1)
            assert rows.shape[1:] == outgoing.shape, (rows.shape, outgoing.shape)
            message, lengths = messages.pack(
                words, counts, which, outgoing.rows, along, outgoing.numbers, rows.shape[0]
            )
            rows = rows.contiguous()
        self._announced = _Announced(header, words, last)
        self._stage = _UNKNOWN
        views = self.group.exchange_views(rows, message, lengths)
        told = self._hear(views, self._announced).unpack()
        at, numbers = torch.from_numpy(told.at), torch.from_numpy(told.numbers)
        return torch.from_numpy(told.counts), Incoming(rows, told.rows, at, numbers, views.rows)

    def _hear(self, views: Views, announced: _Announced) -> messages.Opened:
        """Compare the headers, and know what the others wait for next."""
        opened = messages.open_messages(views.messages, announced.words)
        self._compare(opened.headers, announced, opened.differ)
        self._next, self._stage = self._next + 1, _DONE if announced.last else _PENDING
        return opened

    # Where they do not --------------------------------------------------------------------------------------------

    def _understand(self, received: agreement.Words, announced: _Announced) -> None:
        """Compare the headers, and know what the others wait for next."""
        headers = received[:, : agreement.HEADER]
        self._compare(headers, announced, bool((headers != announced.words).any()))
        outgoing = announced.outgoing
        if outgoing is not None:
            wire_shape = outgoing.shape if prod(outgoing.shape) else (1,)
            row_bytes = prod(wire_shape) * outgoing.like.element_size()
            numbers, rows = received[:, agreement.HEADER : _COUNTS].T.tolist()
            sent = Blocks(outgoing.numbers, outgoing.rows, row_bytes)
            self._packets = _Packets(outgoing, wire_shape, sent, Blocks(numbers, rows, row_bytes))
        self._next, self._rest, self._stage, self._fitting = self._next + 1, announced.rest, _PENDING, 0

    def _exchange_packets(
        self,
        packets: _Packets,
        rows: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        error: BaseException | None = None,
    ) -> Incoming:
        """Send a block to every rank; of a failed call only its head means anything."""
        sent, blocks = packets.sent, packets.received
        assert sent is not None
        assert blocks is not None
        buffer = self.group.rows_to_send((sent.total, *packets.wire_shape), packets.outgoing.like)
        fill(buffer, sent, heads_for(sent, self._next, error), rows, index, numbers)
        received = self.group.exchange_rows(buffer, sent.lengths, blocks.lengths, reuse=True)
        self._stage = _DONE
        heads, along = heads_and_numbers(received, blocks)
        self._check_in_step(np.where(heads[:, 1] == blocks.lengths, heads[:, 0], -1))
        if failure := failure_in(heads):
            rank, text, invalid = failure
            raise agreement.failed_there(rank, self._operator, text, invalid)
        return Incoming(received, np.array(blocks.rows, np.int64), blocks.positions().to(received.device), along)

    def _compare(self, headers: agreement.Words, announced: _Announced, differ: bool) -> None:
        """Raise where ranks are out of step, differ, or say that they failed; the same on every rank."""
        if differ:
            self._check_in_step(headers[:, 0])
            try:
                agreement.check_headers(headers, announced.header.choices)
            except RankDisagreementError:
                self._stage = _DONE  # on every rank
                raise
        self._agreed = announced.header, headers

    def _check_in_step(self, numbers: agreement.Words) -> None:
        """Every rank must have sent what belongs to the exchange just made; −1 for a message that is cut short."""
        if (numbers == self._next).all():
            return
        found, times = np.unique(numbers, return_counts=True)
        odd = tuple(np.flatnonzero(numbers != found[times.argmax()]).tolist())
        where = ", ".join(f"rank {rank} at {number}" for rank, number in enumerate(numbers.tolist()))
        reason = f"found the ranks at different exchanges in {self._operator} ({where}; -1: a message cut short)"
        self.group.break_off(reason, odd)
        self.group.check_usable()


@contextmanager
def together(*calls: GroupCall | None) -> Iterator[None]:
    """Tell the ranks that wait for this one, group by group, if anything is raised inside.

    Args:
        calls: this rank's parts in the order of their exchanges; None for a group that there is not.
    """
    present = tuple(filter(None, calls))
    held: list[Transport] = []
    try:
        for call in present:
            call.group.take_turn()
            held.append(call.group)
        try:
            for call in present:
                call.group.check_usable()
            yield
            for call in present:
                call.finish()
        except BaseException as error:  # also an interrupt: the other ranks wait for this one whatever it was
            for call in present:
                call.stop_reading()  # in every group first, since what one waits for may wait for another
            for call in present:
                call.fail(error)
            raise
    finally:
        for group in held:
            group.end_turn()
