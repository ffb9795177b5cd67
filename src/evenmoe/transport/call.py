"""One rank's part in a collective call, and what becomes of it when something fails there.

A call is a header that all ranks compare (see `agreement`), then one packet of rows to every rank. Whatever is raised
on a rank in between, the exchange that the others wait for is made all the same, with a failure in it: they raise an
error that names the rank, and all ranks are in step for the next call. Only an interrupt does not wait for others: it
breaks the group off, for good.

A packet to one rank is a block of rows: a head with the exchange's number and the block's length, then int32 numbers,
both in as many whole rows as they need, then the rows themselves. So they travel together, and a receiver sees at once
what is not what it waits for.

Shapes: W ranks, H width of a row, N rows of a packet, M numbers of a packet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from evenmoe.errors import LostRankError, RankDisagreementError
from evenmoe.transport import agreement
from evenmoe.transport.agreement import UNKNOWN, Header
from evenmoe.transport.transport import Transport

_HEAD_WORDS, _TEXT = 32, 3  # number of the exchange, rows of the block, status; the text of a failure
_HEAD_BYTES = 8 * _HEAD_WORDS
_MESSAGE_WORDS = 4096  # counts sent to all ranks together: 32 KiB, a latency-bound message on any link
_FEW = 64  # counts for each rank that travel with the first header, however many ranks there are
# What the others wait for: the exchange that comes next; not known, since this rank has not understood their headers;
# nothing more.
_PENDING, _UNKNOWN, _DONE = range(3)
_Memory: TypeAlias = Any  # an array where that is possible, else a tensor: they are sliced and filled alike
_COUNTS = agreement.HEADER + 2  # where counts begin, behind the numbers and the rows of the packet that follows


@dataclass(frozen=True)
class Outgoing:
    """What a rank is going to send to every rank.

    Attributes:
        numbers, rows: int32 numbers and rows for every destination, W each.
        shape: of one row. like: a tensor of its dtype and device.
    """

    numbers: Sequence[int]
    rows: Sequence[int]
    shape: tuple[int, ...]
    like: torch.Tensor


@dataclass(frozen=True)
class Incoming:
    """What a rank was sent.

    Attributes:
        buffer: (rows of all blocks, …), valid until the next packet of the group.
        first: W positions in it, of the first row from every source.
        rows: W row counts.
        numbers: int32 (M,), by source, in the order in which they were sent.
    """

    buffer: torch.Tensor
    first: list[int]
    rows: list[int]
    numbers: torch.Tensor

    def positions(self) -> torch.Tensor:
        """int64 (N,), where every row lies in `buffer`, by source."""
        rows = np.array(self.rows)
        shift = np.repeat(np.array(self.first) - (rows.cumsum() - rows), rows)
        return torch.from_numpy(np.arange(len(shift)) + shift).to(self.buffer.device)


class _Blocks:
    """How the blocks of all ranks lie in a buffer, one after the other: W of each.

    Attributes:
        numbers, rows: int32 numbers and rows of every block.
        lengths: rows of the whole block. starts, first: where it begins, and its first row of all. total: of all.
        row_bytes: bytes of one row.
    """

    def __init__(self, numbers: Sequence[int], rows: Sequence[int], row_bytes: int) -> None:
        self.numbers, self.rows, self.row_bytes, self.total = numbers, list(rows), row_bytes, 0
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.first: list[int] = []
        for num_numbers, num_rows in zip(numbers, rows, strict=True):
            head = -(-(_HEAD_BYTES + 4 * num_numbers) // row_bytes)
            self.starts.append(self.total)
            self.first.append(self.total + head)
            self.lengths.append(head + num_rows)
            self.total += head + num_rows


@dataclass(frozen=True)
class _Packets:
    """The packets that the others wait for, known to all ranks once they have agreed."""

    outgoing: Outgoing
    wire_shape: tuple[int, ...]  # of a row as it travels: one of no bytes is a single element, as a head counts in rows
    sent: _Blocks
    received: _Blocks


@dataclass(frozen=True)
class _Announced:
    """What a rank said in its message: the header, the packet that follows, and the counts that did not fit."""

    header: Header
    words: agreement.Words
    outgoing: Outgoing | None
    rest: torch.Tensor | None


class GroupCall:
    """One rank's part in one collective call of one group: `agree` once or more, then `exchange` once.

    Attributes: `group`, and `number`, that of the exchange which begins the call, by which all ranks know it.

    Args:
        group: the group.
        operator: under whose name the ranks agree.
        rows: the tensor that is to travel, on whose device the ranks exchange; anything else if it is missing.
        heard: whether the others would hear of a failure now; see `narrow`.
    """

    def __init__(self, group: Transport, operator: str, rows: object = None, *, heard: bool = True) -> None:
        self.group, self._operator, self._heard = group, operator, heard
        self._device = rows.device if isinstance(rows, torch.Tensor) and rows.device.type != "meta" else "cpu"
        self.number = self._next = group.number()  # of the exchange that the others wait for
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
        self._operator = header.operator
        fitting, width = self._fitting, counts.shape[1]
        rest = counts[:, fitting:].contiguous() if width > fitting else None
        message = np.zeros((self.group.world_size, _COUNTS + fitting), np.int64)
        message[:, : agreement.HEADER] = header.words
        message[:, 0] = self._next
        if header.dispatch_word:
            message[:, header.dispatch_word] = dispatch
        if outgoing is not None:
            message[:, agreement.HEADER], message[:, agreement.HEADER + 1] = outgoing.numbers, outgoing.rows
        if width:
            message[:, _COUNTS : _COUNTS + width] = (counts if rest is None else counts[:, :fitting]).cpu().numpy()
        self._announced = _Announced(header, message[0, : agreement.HEADER], outgoing, rest)
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
        if index is None:
            index = torch.arange(len(rows), device=rows.device)
        assert len(index) == sum(packets.sent.rows), (len(index), packets.sent.rows)
        shape = packets.outgoing.shape
        if prod(shape):
            return self._exchange_packets(packets, self._packed(packets, rows, index, numbers))
        nothing = rows.new_zeros((len(rows), *packets.wire_shape))
        incoming = self._exchange_packets(packets, self._packed(packets, nothing, index, numbers))
        return replace(incoming, buffer=rows.new_empty((len(incoming.buffer), *shape)))

    def needs(self, gradients: str) -> bool:
        """Whether some rank needs those gradients, so that all of them record; told by the last `agree`."""
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
        if self._stage == _DONE:
            return
        exchanged = group.number() != self._next  # though this rank had not got round to noting it
        if exchanged and self._stage == _PENDING and self._rest is None:
            return  # it was the packet, or an inner part of the call has told the others
        try:
            if exchanged and self._stage == _UNKNOWN:
                assert self._announced is not None
                self._understand(group.last_counts().cpu().numpy(), self._announced)
            elif exchanged:
                self._next, self._rest = self._next + 1, None
            if self._rest is not None:
                self._exchange_rest(self._rest)
            if self._packets is None:
                message = np.zeros((group.world_size, _COUNTS + self._fitting), np.int64)
                message[:, : agreement.HEADER] = agreement.failed_header(self._next, self._operator, error)
                group.exchange_counts(torch.from_numpy(message).to(self._device))
            else:
                self._exchange_packets(self._packets, self._packed(self._packets, error=error))
            self._stage = _DONE
        except (LostRankError, RankDisagreementError):
            pass  # the caller's own error comes first
        except BaseException as another:  # whatever it is, the others must not wait for this rank
            group.break_off(f"failed with {type(another).__name__} in the midst of {self._operator}")

    def _understand(self, received: agreement.Words, announced: _Announced) -> None:
        """Compare the headers, and know what the others wait for next."""
        headers, outgoing = received[:, : agreement.HEADER], announced.outgoing
        if (headers != announced.words).any():
            self._check_in_step(headers[:, 0])
            try:
                agreement.check_headers(headers, announced.header.choices)
            except RankDisagreementError:
                self._stage = _DONE  # on every rank
                raise
        self._agreed = announced.header, headers
        if outgoing is not None:
            wire_shape = outgoing.shape if prod(outgoing.shape) else (1,)
            row_bytes = prod(wire_shape) * outgoing.like.element_size()
            numbers, rows = received[:, agreement.HEADER : _COUNTS].T.tolist()
            sent = _Blocks(outgoing.numbers, outgoing.rows, row_bytes)
            self._packets = _Packets(outgoing, wire_shape, sent, _Blocks(numbers, rows, row_bytes))
        self._next, self._rest, self._stage, self._fitting = self._next + 1, announced.rest, _PENDING, 0

    def _exchange_rest(self, rest: torch.Tensor) -> torch.Tensor:
        received = self.group.exchange_counts(rest)
        self._next, self._rest = self._next + 1, None
        return received

    def _packed(
        self,
        packets: _Packets,
        rows: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        error: BaseException | None = None,
    ) -> torch.Tensor:
        """The blocks for all ranks, in the group's memory; of a failed call only the heads mean anything."""
        blocks = packets.sent
        buffer = self.group.rows_to_send((blocks.total, *packets.wire_shape), packets.outgoing.like)
        if rows is not None and len(rows):
            assert index is not None
            whole = torch.zeros(blocks.total, dtype=index.dtype, device=index.device)
            into: _Memory = whole
            which: _Memory = index
            if index.device.type == "cpu":  # slices of arrays cost a third of those of tensors
                into, which = whole.numpy(), index.numpy()
            taken = 0
            for first, count in zip(blocks.first, blocks.rows, strict=True):
                into[first : first + count] = which[taken : taken + count]
                taken += count
            torch.index_select(rows, 0, whole, out=buffer)
        memory = _bytes(buffer)
        heads: _Memory = self._heads(blocks, error).view(np.uint8)
        heads = heads if isinstance(memory, np.ndarray) else torch.from_numpy(heads).to(memory.device)
        ours = None if numbers is None else _bytes(numbers.contiguous())
        taken = 0
        for rank, (start, count) in enumerate(zip(blocks.starts, blocks.numbers, strict=True)):
            at = start * blocks.row_bytes
            memory[at : at + _HEAD_BYTES] = heads[rank]
            if ours is not None:
                at += _HEAD_BYTES
                memory[at : at + 4 * count] = ours[4 * taken : 4 * (taken + count)]
                taken += count
        return buffer

    def _heads(self, blocks: _Blocks, error: BaseException | None = None) -> agreement.Words:
        """int64 (W, _HEAD_WORDS), what stands in front of every block."""
        heads = np.zeros((len(blocks.rows), _HEAD_WORDS), np.int64)
        heads[:, 0], heads[:, 1] = self._next, blocks.lengths
        if error is not None:
            heads[:, 2] = getattr(error, "status", agreement.FAILED)
            heads[:, _TEXT:] = agreement.text_words(error, _HEAD_WORDS - _TEXT)
        return heads

    def _exchange_packets(self, packets: _Packets, buffer: torch.Tensor) -> Incoming:
        blocks = packets.received
        received = self.group.exchange_rows(buffer, packets.sent.lengths, blocks.lengths, reuse=True)
        self._stage = _DONE
        memory = _bytes(received)
        heads, numbers = [], []
        for start, count in zip(blocks.starts, blocks.numbers, strict=True):
            at = start * blocks.row_bytes + _HEAD_BYTES
            heads.append(memory[at - _HEAD_BYTES : at])
            numbers.append(memory[at : at + 4 * count])
        both, size = _joined(heads + numbers), _HEAD_BYTES * len(heads)
        heads = both[:size].view(torch.int64).cpu().numpy().reshape(-1, _HEAD_WORDS)
        if (heads[:, 0] != self._next).any() or (heads[:, 1] != blocks.lengths).any() or heads[:, 2].any():
            self._check_in_step(np.where(heads[:, 1] == blocks.lengths, heads[:, 0], -1))
            rank = int(np.flatnonzero(heads[:, 2])[0])
            text, invalid = agreement.text_of(heads[rank, _TEXT:]), heads[rank, 2] != agreement.FAILED
            raise agreement.failed_there(rank, self._operator, text, invalid)
        return Incoming(received, blocks.first, blocks.rows, both[size:].view(torch.int32))

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
        except BaseException as error:  # also an interrupt: the other ranks wait for this one whatever it was
            for call in present:
                call.fail(error)
            raise
    finally:
        for group in held:
            group.end_turn()


def _bytes(tensor: torch.Tensor) -> _Memory:
    """The memory of a contiguous tensor as bytes; as an array where that is possible, since its slices cost less."""
    octets = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return octets.numpy() if octets.device.type == "cpu" else octets


def _joined(parts: list[_Memory]) -> torch.Tensor:
    """Pieces of bytes, one after the other, in new memory."""
    return torch.from_numpy(np.concatenate(parts)) if isinstance(parts[0], np.ndarray) else torch.cat(parts)
