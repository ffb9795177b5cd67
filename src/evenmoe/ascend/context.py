"""Contexts: the tensor that V5 of dispatch and combine take in place of the groups' names (specification §2.18).

On the chip it holds where the ranks' communication buffers lie. There are none here, but every rank of every group has
an address that no other has in this process, so a context that a program puts together itself, out of what
HcclGetHcclBuffer and HcclGetRemoteIpcHcclBuf give, works as one of `make_context` does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from evenmoe.contract.tensor_spec import check_dims, check_dtype
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError, require
from evenmoe.ops.operator import spec_of

MEBIBYTE = 1 << 20
#: What HCCL allocates where nothing else is asked for: 200 MB, twice.
DEFAULT_BUFFER_BYTES = 2 * 200 * MEBIBYTE

_MOST_RANKS = 1024
# int32 numbers: the rank, the ranks of its server, one address of 8 bytes; then two tables of addresses.
_HEAD = 4
LENGTH = _HEAD + 2 * 2 * _MOST_RANKS
_GROUP_BYTES = 1 << 40  # between the addresses of two groups; and of two ranks of one
_RANK_BYTES = 1 << 28
_FIX = "write it as CommContextManager.create_context does, or from HcclGetHcclBuffer's address"

_numbers: dict[str, int] = {}  # group -> its number in this process, from 1
_lock = threading.Lock()


def buffer_address(name: str, rank: int) -> int:
    """Where the communication buffer of a group's rank would lie; never 0.

    >>> buffer_address("one", 1) - buffer_address("one", 0) == buffer_address("two", 1) - buffer_address("two", 0) != 0
    True
    """
    with _lock:
        number = _numbers.setdefault(name, len(_numbers) + 1)
    return number * _GROUP_BYTES + rank * _RANK_BYTES


def make_context(name: str, rank: int, world_size: int) -> torch.Tensor:
    """The context of a rank of a group, int32 (4100,).

    >>> context = make_context("a group", 1, 2)
    >>> context.shape, context[:2].tolist(), group_of(context, 1)
    (torch.Size([4100]), [1, 2], 'a group')
    """
    context = torch.zeros(LENGTH, dtype=torch.int32)
    write_context(context, name, rank, world_size)
    return context


def write_context(context: torch.Tensor, name: str, rank: int, world_size: int) -> None:
    """Write a context into a tensor of `make_context`, in place of another group's."""
    context.zero_()
    context[0], context[1] = rank, world_size
    addresses = context[_HEAD:].view(torch.int64)
    addresses[:world_size] = torch.tensor([buffer_address(name, peer) for peer in range(world_size)])


def group_of(context: torch.Tensor, rank: int) -> str:
    """The name of the group that a context of `rank` was written for.

    Raises:
        ConstraintError: another rank's, too short for this one, or no context at all.

    >>> group_of(torch.zeros(4100, dtype=torch.int32), 0)
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `context` is 0 where the buffer of rank 0 should be: it must hold the address of a \
communication buffer of a group of this process; write it as CommContextManager.create_context does, or from \
HcclGetHcclBuffer's address.
    """
    place = _HEAD + 2 * rank
    length = len(context)
    require(length >= place + 2, "context", f"of {length} numbers", f"must have {place + 2} or more for {rank=}", _FIX)
    own = int(context[0])
    require(own == rank, "context", f"of rank {own}", f"must be of ep_rank_id, {rank}", "write one on each rank")
    address = int(context[place : place + 2].view(torch.int64))
    with _lock:
        groups = {number: name for name, number in _numbers.items()}
    name = groups.get(address // _GROUP_BYTES)
    if name is None or buffer_address(name, rank) != address:
        value = f"{address:#x}" if address else "0"
        rule = "must hold the address of a communication buffer of a group of this process"
        raise ConstraintError("context", f"{value} where the buffer of rank {rank} should be", rule, _FIX)
    return name


@dataclass(frozen=True)
class OverContext:
    """What V5 of dispatch and combine have in place of names.

    Attributes:
        context: int32 (any,), read when the call runs.
        ccl_buffer_size: bytes of each rank's communication buffer; 0: there is room enough.
    """

    context: object
    ccl_buffer_size: int

    def check(self, comm_alg: object) -> int | None:
        """Check what is told without reading the context; bytes for the tokens, less 1 MiB for states, None for any.

        Raises:
            MissingArgumentError, UnsupportedTypeError, ConstraintError: a context that is null, of another dtype or not
                of one dimension; a buffer below 1 MiB, or the algorithm that has no contexts.
        """
        if not isinstance(self.context, torch.Tensor):
            raise MissingArgumentError("context", None, "must be given", _FIX)
        spec = spec_of(self.context)
        rule, fix = "must not be hierarchy, which takes groups by name", 'use V4, or ""'
        require(comm_alg != "hierarchy", "comm_alg", comm_alg, rule, fix)
        check_dims("context", spec, (1,), "(numbers,)")
        check_dtype("context", spec, ("int32",))
        size = self.ccl_buffer_size
        if size == 0:
            return None
        rule = f"must be 0, or more than the {MEBIBYTE} bytes of the states"
        fix = "pass what CommContextManager or HcclGetHcclBuffer says"
        require(size > MEBIBYTE, "ccl_buffer_size", size, rule, fix)
        return size - MEBIBYTE

    def in_its_words(self, error: EvenmoeError) -> EvenmoeError:
        """An error of the call that `check` led to; what is said of the window is said of the buffer."""
        if error.argument != "hccl_buffer_bytes":
            return error
        value = f"{self.ccl_buffer_size}, so {error.value} without the states"
        return ConstraintError("ccl_buffer_size", value, error.rule, error.fix)
