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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from evenmoe.errors import LostRankError, RankDisagreementError
from evenmoe.transport import agreement
from evenmoe.transport.contract import Transport

_HEAD_WORDS, _TEXT = 32, 3  # number of the exchange, rows of the block, status; the text of a failure
_HEAD_BYTES = 8 * _HEAD_WORDS
# What the others wait for: the exchange that comes next; not known, since this rank has not understood their headers;
# nothing more.
_PENDING, _UNKNOWN, _DONE = range(3)
_NUMPY = {torch.int32: np.int32, torch.int64: np.int64}
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
        ranges = [np.arange(first, first + count) for first, count in zip(self.first, self.rows, strict=True)]
        return torch.from_numpy(np.concatenate(ranges)).to(self.buffer.device)


class _Blocks:
    """How the blocks of all ranks lie in a buffer, one after the other: W of each.

    Attributes:
        numbers, rows: int32 numbers and rows of every block.
        lengths: rows of the whole block. starts, first: where it begins, and its first row of all. total: of all.
    """

    def __init__(self, numbers: Sequence[int], rows: Sequence[int], row_bytes: int) -> None:
        self.numbers, self.rows = numbers, list(rows)
        heads = [-(-(_HEAD_BYTES + 4 * n) // row_bytes) for n in numbers]
        self.lengths = [head + n for head, n in zip(heads, rows, strict=True)]
        *starts, self.total = accumulate(self.lengths, initial=0)
        self.starts, self.first = starts, [start + head for start, head in zip(starts, heads, strict=True)]

    def places(self, num_bytes: int) -> list[int]:
        """Where the blocks begin in the memory of the whole buffer, in bytes."""
        row_bytes = num_bytes // self.total
        return [start * row_bytes for start in self.starts]


@dataclass(frozen=True)
class _Plan:
    """The packets that the others wait for, known to all ranks once they have agreed."""

    outgoing: Outgoing
    sent: _Blocks
    received: _Blocks


#: What a rank said in its header: the packet, the counts that did not fit, and words for the values of sizes.
_Announced: TypeAlias = tuple[Outgoing | None, torch.Tensor | None, Mapping[str, Mapping[int, str]]]


class GroupCall:
    """One rank's part in one collective call of one group: `agree` once or more, then `exchange` once.

    Args:
        group: the group.
        operator: under whose name the ranks agree.
        device: of the tensors that travel.
        heard: whether the others would hear of a failure now; see `narrow`.
    """

    def __init__(
        self, group: Transport, operator: str, device: torch.device | str = "cpu", *, heard: bool = True
    ) -> None:
        self.group, self._operator, self._device, self._heard = group, operator, device, heard
        self._next = group.number()  # of the exchange that the others wait for
        self._stage = _PENDING
        self._announced: _Announced = None, None, {}
        self._plan: _Plan | None = None  # once agreed
        self._rest: torch.Tensor | None = None  # counts that did not fit beside the header
        self._fitting = agreement.fitting(group.world_size)  # counts beside it; later headers come with few

    def narrow(self, group: Transport) -> None:
        """Go on with the ranks that are left, which wait for this one from now on."""
        self.group, self._heard, self._next = group, True, group.number()
        self._fitting = agreement.fitting(group.world_size)

    def agree(
        self,
        sizes: Mapping[str, int],
        counts: torch.Tensor,
        outgoing: Outgoing | None = None,
        *,
        operator: str | None = None,
        choices: Mapping[str, Mapping[int, str]] | None = None,
    ) -> torch.Tensor:
        """Exchange `counts` between ranks that agree on `sizes`; raise the same error on every rank if they do not.

        Args:
            sizes: {name: value} for every name of the operator in `agreement.OPERATORS`.
            counts: int64 (W, n); row d goes to rank d.
            outgoing: the packet that follows. None if the ranks have to agree once more before.
            operator: another name than the call's.
            choices: {name: {value: words}} for names whose values stand for words, for the error.

        Returns:
            int64 (W, n), row s from rank s.

        Raises:
            RankDisagreementError: ranks make different calls or call with different sizes, or one of them failed.
            LostRankError: a rank is gone, or out of step.
        """
        self._operator = operator or self._operator
        fitting, width = self._fitting, counts.shape[1]
        rest = counts[:, fitting:].contiguous() if width > fitting else None
        header = agreement.header(self._next, self._operator, sizes)
        self._announced = outgoing, rest, choices or {}
        received = self._exchange_headers(header, outgoing, counts[:, :fitting])
        self._understand(received.cpu().numpy(), *self._announced)
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
        plan = self._plan
        assert plan is not None, "the ranks have agreed"
        if index is None:
            index = torch.arange(len(rows), device=rows.device)
        assert len(index) == sum(plan.sent.rows), (len(index), plan.sent.rows)
        shape = plan.outgoing.shape
        if not prod(shape):
            rows = rows.new_zeros((len(rows), *_wire_shape(shape)))
        incoming = self._exchange_packets(plan, self._packed(plan, rows, index, numbers))
        return incoming if prod(shape) else replace(incoming, buffer=rows.new_empty((len(incoming.buffer), *shape)))

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
                self._understand(group.last_counts().cpu().numpy(), *self._announced)
            elif exchanged:
                self._next, self._rest = self._next + 1, None
            if self._rest is not None:
                self._exchange_rest(self._rest)
            if self._plan is None:
                self._exchange_headers(agreement.failed_header(self._next, self._operator, error))
            else:
                self._exchange_packets(self._plan, self._packed(self._plan, error=error))
            self._stage = _DONE
        except (LostRankError, RankDisagreementError):
            pass  # the caller's own error comes first
        except BaseException as another:  # whatever it is, the others must not wait for this rank
            group.break_off(f"failed with {type(another).__name__} in the midst of {self._operator}")

    def _exchange_headers(
        self, header: agreement.Words, outgoing: Outgoing | None = None, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Header, sizes of the packet and counts to every rank; int64 (W, _COUNTS + as many counts as fit)."""
        words = np.zeros((self.group.world_size, _COUNTS + self._fitting), np.int64)
        words[:, : agreement.HEADER] = header
        if outgoing is not None:
            words[:, agreement.HEADER], words[:, agreement.HEADER + 1] = outgoing.numbers, outgoing.rows
        if counts is not None:
            words[:, _COUNTS : _COUNTS + counts.shape[1]] = counts.cpu().numpy()
        message = torch.from_numpy(words).to(self._device)
        self._stage = _UNKNOWN
        return self.group.exchange_counts(message)

    def _understand(
        self,
        received: agreement.Words,
        outgoing: Outgoing | None,
        rest: torch.Tensor | None,
        choices: Mapping[str, Mapping[int, str]],
    ) -> None:
        """Compare the headers, and know what the others wait for next."""
        headers = received[:, : agreement.HEADER]
        self._check_in_step(headers[:, 0])
        try:
            agreement.check_headers(headers, choices)
        except RankDisagreementError:
            self._stage = _DONE  # on every rank
            raise
        if outgoing is not None:
            row_bytes = prod(_wire_shape(outgoing.shape)) * outgoing.like.element_size()
            numbers, rows = received[:, agreement.HEADER : _COUNTS].T.tolist()
            sent = _Blocks(outgoing.numbers, outgoing.rows, row_bytes)
            self._plan = _Plan(outgoing, sent, _Blocks(numbers, rows, row_bytes))
        self._next, self._rest, self._stage, self._fitting = self._next + 1, rest, _PENDING, 0

    def _exchange_rest(self, rest: torch.Tensor) -> torch.Tensor:
        received = self.group.exchange_counts(rest)
        self._next, self._rest = self._next + 1, None
        return received

    def _packed(
        self,
        plan: _Plan,
        rows: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        error: BaseException | None = None,
    ) -> torch.Tensor:
        """The blocks for all ranks, in the group's memory; of a failed call only the heads mean anything."""
        blocks = plan.sent
        buffer = self.group.rows_to_send((blocks.total, *_wire_shape(plan.outgoing.shape)), plan.outgoing.like)
        if rows is not None and len(rows):
            assert index is not None
            whole = torch.zeros(blocks.total, dtype=index.dtype, device=index.device)
            into, which = _plain(whole), _plain(index)
            taken = 0
            for first, count in zip(blocks.first, blocks.rows, strict=True):
                into[first : first + count] = which[taken : taken + count]
                taken += count
            torch.index_select(rows, 0, whole, out=buffer)
        memory = _plain(_bytes_of(buffer))
        heads = _bytes_like(memory, self._heads(blocks, error))
        ours = None if numbers is None else _plain(_bytes_of(numbers.contiguous()))
        taken = 0
        for rank, (place, count) in enumerate(zip(blocks.places(len(memory)), blocks.numbers, strict=True)):
            memory[place : place + _HEAD_BYTES] = heads[rank]
            if ours is not None:
                place += _HEAD_BYTES
                memory[place : place + 4 * count] = ours[4 * taken : 4 * (taken + count)]
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

    def _exchange_packets(self, plan: _Plan, buffer: torch.Tensor) -> Incoming:
        blocks = plan.received
        received = self.group.exchange_rows(buffer, plan.sent.lengths, blocks.lengths, into_scratch=True)
        self._stage = _DONE
        memory = _plain(_bytes_of(received))
        places = blocks.places(len(memory))
        heads = _joined([memory[place : place + _HEAD_BYTES] for place in places], torch.int64)
        heads = heads.cpu().numpy().reshape(-1, _HEAD_WORDS)
        if (heads[:, :_TEXT] != self._heads(blocks)[:, :_TEXT]).any():
            self._check_in_step(np.where(heads[:, 1] == blocks.lengths, heads[:, 0], -1))
            rank = int(np.flatnonzero(heads[:, 2])[0])
            text, refused = agreement.text_of(heads[rank, _TEXT:]), heads[rank, 2] != agreement.FAILED
            raise agreement.failed_there(rank, self._operator, text, refused)
        numbers = [
            memory[place + _HEAD_BYTES : place + _HEAD_BYTES + 4 * count]
            for place, count in zip(places, blocks.numbers, strict=True)
        ]
        return Incoming(received, blocks.first, blocks.rows, _joined(numbers, torch.int32))

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
    present = [call for call in calls if call is not None]
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


def _wire_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a row as it travels: one of no bytes travels as a single element, since a head counts in rows."""
    return shape if prod(shape) else (1,)


def _plain(tensor: torch.Tensor) -> Any:
    """The same memory as an array where that is possible: slices of arrays cost a third of those of tensors."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, as uint8."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _bytes_like(memory: Any, words: agreement.Words) -> Any:
    """Rows of words as rows of bytes, of the kind of `memory`."""
    octets = words.view(np.uint8)
    return octets if isinstance(memory, np.ndarray) else torch.from_numpy(octets).to(memory.device)


def _joined(parts: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """Pieces of bytes, one after the other, in new memory and seen as `dtype`."""
    if isinstance(parts[0], np.ndarray):
        return torch.from_numpy(np.concatenate(parts).view(_NUMPY[dtype]))
    return torch.cat(parts).view(dtype)
