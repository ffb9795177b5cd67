"""Memory that the processes of a group share, and waiting for a number in it to change.

The memory is a file without a name (memfd_create) that rank 0 makes and hands to the others over a Unix socket. So
nothing stands in /dev/shm at any moment, and the system takes the memory back when the last of the processes has ended,
however it ended. The file is as large as all ranks could ever need, and costs nothing where it has not been written: it
grows by being used.

Linux alone has both; what stands in the way elsewhere is said in a sentence.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

Gather = Callable[[dict[str, object]], list[dict[str, object]]]
Octets = npt.NDArray[np.uint8]

_HAND_OVER_S = 5.0
_TOKEN = 16  # bytes that show who belongs to the group
_ADDRESSES = 1 << 46  # bytes of addresses, half of what a process has on x86-64 and aarch64
# Numbers of the system call by processor; where there is none, ranks sleep and look again.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_NAP_S = 0.0005  # between two looks without a futex


def this_host() -> str:
    """What is equal in two processes that can share memory and reach each other at 127.0.0.1."""
    boot = network = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        network = str(Path("/proc/self/ns/net").readlink())  # containers of one host may not share 127.0.0.1
    return f"{socket.gethostname()} {boot} {network}"


def share_memory(rank: int, world_size: int, gather: Gather) -> tuple[Octets | None, str]:
    """Map memory that all ranks of a group share; a collective of the group.

    Args:
        gather: a value of this rank -> those of all ranks, in rank order.

    Returns:
        uint8 (n,), zeros, the same memory on every rank, n a multiple of the page size and of the world size; or None,
        on every rank alike, and why not: a clause without a full stop.
    """
    said = gather({"host": this_host(), "obstacle": _obstacle()})
    if len({str(one["host"]) for one in said}) > 1:
        return None, "the ranks of the group are on several hosts"
    if reason := _first_reason(said, "obstacle"):
        return None, reason
    made: _Made | None = None
    offer: dict[str, object] = {"failure": ""}
    if rank == 0:
        try:
            made = _Made(world_size)
            offer |= {"address": made.address, "token": made.token.hex()}
        except OSError as error:
            offer["failure"] = f"it could not be made ({error})"
    memory, failure = None, ""
    try:
        offers = gather(offer)
        if reason := _first_reason(offers, "failure"):
            return None, reason
        memory = _take(str(offers[0]["address"]), str(offers[0]["token"])) if made is None else made.hand_over()
    except OSError as error:
        failure = f"it could not be handed over ({error})"
    finally:
        if made is not None:
            made.close()
    reason = _first_reason(gather({"failure": failure}), "failure")
    return (None, reason) if reason else (memory, "")


def wait_for_change(address: int, value: int, patience_s: float) -> None:
    """Sleep until somebody calls `wake` for the int32 at `address`, at once if it is not `value`; or for `patience_s`.

    It may return early, as when a signal comes.
    """
    if _FUTEX is None:
        time.sleep(min(patience_s, _NAP_S))
        return
    patience = _Timespec(int(patience_s), int(patience_s % 1 * 1e9))
    _system_call(_FUTEX, address, _FUTEX_WAIT, value, ctypes.addressof(patience), 0, 0)


def wake(address: int) -> None:
    """Wake every rank that waits for the int32 at `address`, which has been changed."""
    if _FUTEX is not None:
        _system_call(_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, 0, 0, 0)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_system_call = ctypes.CDLL(None).syscall
_system_call.argtypes = [ctypes.c_long] * 7
_system_call.restype = ctypes.c_long


def _obstacle() -> str:
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return "this needs Linux"
    if sys.byteorder != "little":
        return "this needs a little-endian processor"
    return ""


def _first_reason(said: list[dict[str, object]], name: str) -> str:
    return next((f"{one[name]} on rank {rank}" for rank, one in enumerate(said) if one[name]), "")


class _Made:
    """Rank 0's side of the handing over: the memory, and a socket where the others ask for it."""

    def __init__(self, world_size: int) -> None:
        self.token, self._others = secrets.token_bytes(_TOKEN), world_size - 1
        self.address = f"evenmoe-{secrets.token_hex(_TOKEN)}"
        page = mmap.PAGESIZE
        # A rank cannot need more than the host has.
        each = min(os.sysconf("SC_PHYS_PAGES"), _ADDRESSES // page // world_size)
        self._file = os.memfd_create("evenmoe")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.ftruncate(self._file, each * page * world_size)
            self._memory = _mapped(self._file)
            self._listener.bind(b"\0" + self.address.encode())  # of the abstract kind, which stands in no folder
            self._listener.listen(world_size)
        except BaseException:
            self.close()
            raise

    def hand_over(self) -> Octets:
        """Give the file to every other rank that asks and shows the token; return the memory."""
        deadline = time.monotonic() + _HAND_OVER_S
        while self._others:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(_HAND_OVER_S)
                if secrets.compare_digest(connection.recv(_TOKEN, socket.MSG_WAITALL), self.token):
                    socket.send_fds(connection, [b"x"], [self._file])
                    self._others -= 1
        return self._memory

    def close(self) -> None:
        """Close the file and the socket; a mapping stays."""
        self._listener.close()
        os.close(self._file)


def _take(address: str, token: str) -> Octets:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_HAND_OVER_S)
        connection.connect(b"\0" + address.encode())
        connection.sendall(bytes.fromhex(token))
        _, files, _, _ = socket.recv_fds(connection, 1, 1)
    if not files:
        raise OSError("rank 0 has refused")
    try:
        return _mapped(files[0])
    finally:
        os.close(files[0])


def _mapped(file: int) -> Octets:
    mapping = mmap.mmap(file, os.fstat(file).st_size, mmap.MAP_SHARED)
    with suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # where the system gives them to shared memory
        mapping.madvise(mmap.MADV_DONTDUMP)
    return np.frombuffer(mapping, np.uint8)
