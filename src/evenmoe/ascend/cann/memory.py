"""Device memory: blocks of the host's, each a torch tensor of bytes, so that work in flight keeps its block alive."""

from __future__ import annotations

import bisect
import ctypes
import threading
from typing import NamedTuple

import torch

from evenmoe.ascend import status
from evenmoe.ascend.status import ACL_INVALID_PARAM, RT_MEMORY_ALLOCATION, AclError, acl_error, null_pointer

BYTES_PER_DEVICE = 64 * 2**30  # an Atlas A3 die; more would only be overcommitted by the host

_TO_DEVICE, _FROM_DEVICE = (1, 3), (2, 3)  # aclrtMemcpyKind
_KINDS = range(4)


class Block(NamedTuple):
    """One allocation."""

    device: int
    data: torch.Tensor  # uint8 (bytes,)


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

    def fill(self, address: int, value: int, size: int) -> None:
        """Set bytes, as aclrtMemset does."""
        block = self.check_room("devPtr", address, size)
        start = address - block.data.data_ptr()
        block.data[start : start + size] = value & 0xFF


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
        raise acl_error(
            ACL_INVALID_PARAM, "kind", kind, "must be an aclrtMemcpyKind, 0 to 3", "say where both sides are"
        )
    for argument, address in (("dst", destination), ("src", source)):
        if address == 0:
            raise null_pointer(ACL_INVALID_PARAM, argument)
    if size > room:
        raise acl_error(ACL_INVALID_PARAM, "count", size, f"must be at most destMax, {room}", "copy less")
    sides = [
        _check_side(memory, argument, address, size, on_device)
        for argument, address, on_device in (
            ("dst", destination, kind in _TO_DEVICE),
            ("src", source, kind in _FROM_DEVICE),
        )
    ]
    return Copy(destination, source, size, (sides[0], sides[1]))


def _check_side(memory: Memory, argument: str, address: int, size: int, on_device: bool) -> Block | None:
    if on_device:
        return memory.check_room(argument, address, size)
    if memory.find(address) is not None:
        rule = "must be host memory, as kind says"
        raise acl_error(status.RT_PARAM_INVALID, argument, f"{address:#x}, device memory", rule, "pass the other kind")
    return None


def _too_much(size: int, rule: str) -> AclError:
    return acl_error(RT_MEMORY_ALLOCATION, "size", size, rule, "free something, or allocate less")
