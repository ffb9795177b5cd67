"""Device memory, and `aclTensor`: a view described by shape, strides, offset and address of it.

Blocks are the host's, each a torch tensor of bytes, so that work in flight keeps its block alive.
"""

from __future__ import annotations

import bisect
import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from evenmoe.ascend import status
from evenmoe.ascend.status import ACL_INVALID_PARAM, RT_MEMORY_ALLOCATION, AclError, acl_error, null_pointer
from evenmoe.ascend.tensors import check_no_overlap
from evenmoe.errors import MissingArgumentError, UnsupportedTypeError, require

DTYPES = {  # aclDataType; those without an entry have no torch dtype
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    33: torch.complex32,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}
_FRACTAL_NZ = 29
_MOST_DIMS = 25  # the library reads no longer list
BYTES_PER_DEVICE = 64 * 2**30  # an Atlas A3 die; more would only be overcommitted by the host

_TO_DEVICE, _FROM_DEVICE = (1, 3), (2, 3)  # aclrtMemcpyKind
_KINDS = range(4)


class Block(NamedTuple):
    """One allocation."""

    device: int
    data: torch.Tensor  # uint8 (bytes,)

    def fill(self, address: int, value: int, size: int) -> None:
        """Set bytes, as aclrtMemset does; they are all inside."""
        start = address - self.data.data_ptr()
        self.data[start : start + size] = value & 0xFF


class Memory:
    """The allocations of all devices, by address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, Block] = {}
        self._addresses: list[int] = []  # ascending
        self._used: dict[int, int] = {}  # device -> bytes

    def allocate(self, device: int, size: int) -> int:
        """Address of `size` new bytes, 64-byte aligned.

        Raises:
            AclError: no byte at all (100000), or more than the device has left (207001).
        """
        if size == 0:
            raise acl_error(ACL_INVALID_PARAM, "size", 0, "must be 1 or more", "allocate nothing for an empty tensor")
        with self._lock:
            left = BYTES_PER_DEVICE - self._used.get(device, 0)
            if size > left:
                raise _too_much(size, f"must fit into the {left} bytes that device {device} has left")
            try:
                data = torch.empty(size, dtype=torch.uint8)
            except RuntimeError:
                raise _too_much(size, "must fit into the memory of this machine") from None
            address = data.data_ptr()
            self._blocks[address] = Block(device, data)
            bisect.insort(self._addresses, address)
            self._used[device] = self._used.get(device, 0) + size
            return address

    def free(self, address: int) -> None:
        """Give a block back; what still works with it keeps it until it is done.

        Raises:
            AclError: not the address of a live block (107000).
        """
        with self._lock:
            block = self._blocks.pop(address, None)
            if block is None:
                rule = "must be an address that aclrtMalloc returned and nobody has freed"
                raise acl_error(status.RT_PARAM_INVALID, "devPtr", f"{address:#x}", rule, "free each allocation once")
            self._addresses.remove(address)
            self._used[block.device] -= block.data.numel()

    def free_device(self, device: int | None) -> None:
        """Give back everything of one device, or of all."""
        for address, block in list(self._blocks.items()):
            if device in (None, block.device):
                self.free(address)

    def find(self, address: int) -> tuple[Block, int] | None:
        """The block that an address lies in, and its bytes before that address."""
        with self._lock:
            place = bisect.bisect_right(self._addresses, address) - 1
            if place < 0:
                return None
            block = self._blocks[self._addresses[place]]
            offset = address - self._addresses[place]
            return (block, offset) if offset < block.data.numel() else None

    def check_room(self, argument: str, address: int, size: int, code: int = status.RT_PARAM_INVALID) -> Block:
        """The block around `size` bytes at `address`.

        Raises:
            AclError: they are not all inside one live block.
        """
        found = self.find(address)
        if found is None:
            rule = "must lie in memory of aclrtMalloc that is not freed"
            raise acl_error(code, argument, f"{address:#x}", rule, "allocate it on the device")
        block, offset = found
        room = block.data.numel() - offset
        if size > room:
            rule = f"must have room for {size} bytes, and its allocation ends after {room}"
            raise acl_error(code, argument, f"{address:#x}", rule, "allocate more, or pass fewer")
        return block

    def used(self, device: int) -> int:
        """Bytes that are allocated on a device."""
        with self._lock:
            return self._used.get(device, 0)


class Copy(NamedTuple):
    """A checked copy; it holds on to the blocks that it touches."""

    destination: int
    source: int
    size: int
    blocks: tuple[Block | None, Block | None]

    def run(self) -> None:
        ctypes.memmove(self.destination, self.source, self.size)


def check_copy(memory: Memory, destination: int, room: int, source: int, size: int, kind: int) -> Copy:
    """A copy as aclrtMemcpy takes it.

    Raises:
        AclError: a null pointer, more bytes than `destMax`, another kind than 0 to 3 (100000); a device's side outside
            one live allocation, a host's side that is device memory (107000).
    """
    if kind not in _KINDS:
        rule = "must be an aclrtMemcpyKind, 0 to 3"
        raise acl_error(ACL_INVALID_PARAM, "kind", kind, rule, "say where both sides are")
    for argument, address in (("dst", destination), ("src", source)):
        if address == 0:
            raise null_pointer(ACL_INVALID_PARAM, argument)
    if size > room:
        raise acl_error(ACL_INVALID_PARAM, "count", size, f"must be at most destMax, {room}", "copy less")
    into = _check_side(memory, "dst", destination, size, kind in _TO_DEVICE)
    return Copy(destination, source, size, (into, _check_side(memory, "src", source, size, kind in _FROM_DEVICE)))


def _check_side(memory: Memory, argument: str, address: int, size: int, on_device: bool) -> Block | None:
    if on_device:
        return memory.check_room(argument, address, size)
    if memory.find(address) is not None:
        rule = "must be host memory, as kind says"
        raise acl_error(status.RT_PARAM_INVALID, argument, f"{address:#x}, device memory", rule, "pass the other kind")
    return None


def _too_much(size: int, rule: str) -> AclError:
    return acl_error(RT_MEMORY_ALLOCATION, "size", size, rule, "free something, or allocate less")


@dataclass(frozen=True)
class TensorDescription:
    """What aclCreateTensor was told; strides and offset count elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: int
    format: int
    address: int


def describe_tensor(
    dims: Sequence[int] | None,
    num_dims: int,
    dtype: int,
    strides: Sequence[int] | None,
    offset: int,
    format: int,
    storage_dims: Sequence[int] | None,
    num_storage_dims: int,
    address: int,
) -> TensorDescription:
    """The description, as far as it can be one; which memory it needs is looked at when an operator is called.

    Raises:
        AclError: dimensions that are missing, negative or too many, a negative stride or offset (161002).
    """
    for argument, values, count in (("viewDims", dims, num_dims), ("storageDims", storage_dims, num_storage_dims)):
        if count > _MOST_DIMS:
            raise _invalid(f"{argument}Num", count, f"must be at most {_MOST_DIMS}", "use fewer dimensions")
        if values is None and count:
            raise null_pointer(status.PARAM_NULLPTR, argument)
        _check_not_negative(argument, values or ())
    shape = tuple(dims or ())
    if strides is None:  # those of a contiguous tensor
        strides = [prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
    _check_not_negative("stride", strides)
    _check_not_negative("offset", [offset])
    return TensorDescription(shape, tuple(strides), offset, dtype, format, address)


def _check_not_negative(argument: str, values: Sequence[int]) -> None:
    if any(value < 0 for value in values):
        raise _invalid(argument, list(values), "must not be negative", "pass 0 or more")


def dtype_of(argument: str, tensor: TensorDescription) -> torch.dtype:
    """The torch dtype of a tensor whose elements torch can count, in 64 bits.

    Raises:
        UnsupportedTypeError: a data type that torch does not have.
        ConstraintError: a shape with 2^63 elements or more.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        rule = "must be a type that the operator takes"
        raise UnsupportedTypeError(argument, f"of aclDataType {tensor.dtype}", rule, "convert it")
    fits = prod(max(size, 1) for size in tensor.shape) < 2**63
    require(fits, argument, f"{tensor.shape}", "must have fewer than 2^63 elements", "use a smaller shape")
    return dtype


def shape_only(argument: str, tensor: TensorDescription) -> torch.Tensor:
    """A tensor of this shape and type without any memory, for checks that look at nothing else."""
    dtype = dtype_of(argument, tensor)
    return torch.empty((), dtype=dtype, device="meta").as_strided(tensor.shape, [0] * len(tensor.shape))


def view(memory: Memory, argument: str, tensor: TensorDescription, written: bool) -> torch.Tensor:
    """The torch tensor over the memory that a description names.

    Args:
        argument: its name in the call, for messages.
        written: whether the operator writes it; then no two elements may share memory.

    Raises:
        MissingArgumentError: it has elements, and a null address.
        UnsupportedTypeError: memory that is not the device's, too small, or not aligned to the element.
        ConstraintError: the format NZ; an output whose elements overlap.
    """
    dtype = dtype_of(argument, tensor)
    value = "in format ACL_FORMAT_FRACTAL_NZ"
    require(tensor.format != _FRACTAL_NZ, argument, value, "must be ND", "use ACL_FORMAT_ND")
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.address == 0:
        raise MissingArgumentError(argument, "a tensor at a null address", "must have memory", "call aclrtMalloc")
    if written:
        check_no_overlap(argument, tensor.shape, tensor.strides)
    found = memory.find(tensor.address)
    if found is None:
        raise UnsupportedTypeError(
            argument, f"at {tensor.address:#x}", "must lie in memory of aclrtMalloc", "copy it to the device"
        )
    block, byte = found
    size = dtype.itemsize
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if byte % size:
        rule = f"must be aligned to its elements of {size} bytes"
        raise UnsupportedTypeError(argument, f"at {tensor.address:#x}", rule, "align it")
    needed, room = (last + 1) * size, block.data.numel() - byte
    if needed > room:
        rule = f"must have room for its {needed} bytes"
        raise UnsupportedTypeError(argument, f"in an allocation with {room} bytes", rule, "allocate more")
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(block.data.untyped_storage(), byte // size + tensor.offset, tensor.shape, tensor.strides)


def _invalid(argument: str, value: object, rule: str, fix: str) -> Exception:
    return acl_error(status.PARAM_INVALID, argument, value, rule, fix)
