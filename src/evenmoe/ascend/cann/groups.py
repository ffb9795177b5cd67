"""HCCL groups of a C program: of the devices of one process, or of one device in each of several on this host."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]: documented

from evenmoe.ascend import status
from evenmoe.ascend.cann.rank_table import announced, found, read_rank_table
from evenmoe.ascend.cann.runtime import DRAIN_S, NUM_DEVICES, Handles
from evenmoe.ascend.context import DEFAULT_BUFFER_BYTES, MEBIBYTE
from evenmoe.ascend.groups import Membership, peers_here, taking_part
from evenmoe.ascend.status import AclError, acl_error
from evenmoe.ascend.stream import Stream
from evenmoe.errors import LostRankError
from evenmoe.transport.agreement import Header
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_world import join_group
from evenmoe.transport.rendezvous import Rendezvous
from evenmoe.transport.transport import Transport, register, unregister
from evenmoe.transport.world import LocalTransport

# A rank that never comes is reported by aclrtSynchronizeStreamWithTimeout; this bounds a wait without one.
_EXCHANGE_S = 600.0
JOIN_S = 120.0  # for the processes of a group to come: the chip's HCCL_CONNECT_TIMEOUT, unless it is set
_BUFFER_NOT_SET = 0xFFFFFFFF  # HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET
_HOST = "127.0.0.1"
_KEY = "evenmoe root info"


@dataclass(eq=False)
class Communicator:
    """One device's end of a group, and the calls that were launched over it: (stream, number in it)."""

    device: int
    transport: Transport
    calls: list[tuple[Stream, int]] = field(default_factory=list)
    buffer_bytes: int = DEFAULT_BUFFER_BYTES  # what HCCL would allocate

    def set_buffer(self, megabytes: int) -> None:
        """Note hcclBufferSize of a group's configuration, of which HCCL allocates twice as much."""
        if megabytes != _BUFFER_NOT_SET:
            self.buffer_bytes = 2 * megabytes * MEBIBYTE


class Communicators:
    """All groups of the process."""

    def __init__(self) -> None:
        self.handles: Handles[Communicator] = Handles(
            3, "a communicator", "HcclCommInitAll", status.HCCL_PARA, status.HCCL_PTR
        )
        self._numbers = itertools.count()
        self._roots: list[TCPStore] = []  # of root infos of this process, where its groups meet

    def create(self, devices: list[int]) -> list[int]:
        """One group; rank r is devices[r].

        Raises:
            AclError: no device, one twice, or one there is not (HCCL_E_PARA).
        """
        bad = [device for device in devices if not 0 <= device < NUM_DEVICES]
        if not devices or bad or len(set(devices)) < len(devices):
            rule = f"must be distinct devices, each 0 to {NUM_DEVICES - 1}, and at least one"
            raise acl_error(status.HCCL_PARA, "devices", devices, rule, "list each device of the group once")
        rendezvous = Rendezvous(f"evenmoe_hccl_{next(self._numbers)}", len(devices), _EXCHANGE_S)
        return [self._add(device, LocalTransport(rendezvous, rank)) for rank, device in enumerate(devices)]

    def root_info(self) -> str:
        """Open a place where the processes of one group meet; the text by which they find it, below 4 KiB."""
        store = TCPStore(_HOST, 0, None, True, timedelta(seconds=JOIN_S), wait_for_workers=False)
        self._roots.append(store)
        name = f"evenmoe_hccl_{os.getpid()}_{secrets.token_hex(4)}"
        return _Root(store.port, name, os.getpid()).text()

    def join(self, size: int, root_info: str, rank: int, device: int, name: str = "", join_s: float = JOIN_S) -> int:
        """This process's rank of a group of processes; returns once all have come.

        Args:
            name: of the group, instead of the root info's.
            join_s: seconds that the others may take.

        Raises:
            AclError: a rank out of range, given twice, another size on another rank or a text that is no root info
                (HCCL_E_PARA); the root's process is gone (HCCL_E_TCP_CONNECT); ranks that did not come in time
                (HCCL_E_TIMEOUT), which the message names.
        """
        if not 0 <= rank < size:
            rule = f"must be 0 to nRanks - 1, {size - 1}" if size else "needs a group of at least one rank"
            raise acl_error(status.HCCL_PARA, "rank", rank, rule, "number the ranks of the group from 0")
        root = _root_of(root_info)
        store, group = root.store(join_s), root.group
        try:
            first = store.compare_set(f"{group}/size", "", str(size)).decode()
            twice = store.add(f"{group}/rank {rank}", 1) > 1
        except RuntimeError as error:
            raise root.gone() from error
        if first != str(size):
            rule, fix = f"must be {first}, as on the first rank that came", "pass the same number on all ranks"
            raise acl_error(status.HCCL_PARA, "nRanks", size, rule, fix)
        if twice:
            rule, fix = "must be of one process or thread alone", "give every rank a number of its own"
            raise acl_error(status.HCCL_PARA, "rank", f"{rank}, which has come before", rule, fix)
        holder = root.process == os.getpid() and rank == 0
        try:
            transport = join_group(
                store, group, name or group, rank, size, join_s=join_s, exchange_s=_EXCHANGE_S, stays=holder
            )
        except LostRankError as error:
            raise AclError(status.HCCL_TIMEOUT, f"The group could not be opened: {error}.") from error
        return self._add(device, transport)

    def join_by_table(self, path: str, rank: int, device: int, name: str = "", join_s: float = JOIN_S) -> int:
        """This process's rank of the group that a rank table names, if all its ranks are on one server.

        Raises:
            AclError: as `join` and `read_rank_table`; ranks on several servers (HCCL_E_NOT_SUPPORT).
        """
        size, digest = read_rank_table(path, rank)
        end = time.monotonic() + join_s
        if rank == 0:
            with announced(digest, self.root_info()) as root_info:
                return self.join(size, root_info, rank, device, name, join_s)
        while True:
            root_info = found(digest, end - time.monotonic())
            try:
                return self.join(size, root_info, rank, device, name, max(0.1, end - time.monotonic()))
            except AclError as error:
                # What an earlier group of the same table has left for a moment: its rank 0 will remove it.
                stale = error.status == status.HCCL_TCP_CONNECT or "has come before" in error.message
                if not stale or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def barrier(self, handle: int, stream: Stream) -> None:
        """Let a stream wait until all ranks of a group have come to their barrier."""
        communicator = self.handles.get("comm", handle)
        group = communicator.transport

        def work() -> None:
            membership = Membership(group.name, group.rank, tuple(peers_here(group.name, group.world_size)))
            with taking_part([membership]), together(part := GroupCall(group, "HcclBarrier")):
                part.agree(Header("HcclBarrier", {}), torch.zeros((group.world_size, 0), dtype=torch.int64))

        number = stream.enqueue(work, lambda: f"HcclBarrier as rank {group.rank} of group {group.name!r}")
        self.launched([(group.name, group.rank, group.world_size)], stream, number)

    def launched(self, groups: Iterable[tuple[str | None, int, int]], stream: Stream, number: int) -> None:
        """Note that a call over these groups, (name, rank, size) each, is on a stream, which `destroy` waits for.

        A group of which a context will tell may be any in which that rank is one of so many.
        """
        concerned = set(groups)
        for communicator in self.handles.values():
            group = communicator.transport
            if concerned & {(name, group.rank, group.world_size) for name in (group.name, None)}:
                communicator.calls = [call for call in communicator.calls if not call[0].has_done(call[1])]
                communicator.calls.append((stream, number))

    def destroy(self, handle: int, drain_s: float = DRAIN_S) -> None:
        """Close one device's end after the calls that it launched; a rank that still waits for it is told.

        Raises:
            AclError: a call was not done in time (HCCL_E_TIMEOUT); the end is closed even so.
        """
        communicator = self.handles.pop("comm", handle)
        end = time.monotonic() + drain_s
        late = None
        for stream, number in communicator.calls:
            try:
                stream.wait_for(number, round(max(0.0, end - time.monotonic()), 2))
            except AclError as error:
                if error.status == status.RT_STREAM_SYNC_TIMEOUT:  # else the stream was destroyed, and the call with it
                    late = late or error
        _close(communicator)
        if late is not None:
            rule, fix = "must have no call that is not done", "synchronize its streams before HcclCommDestroy"
            raise acl_error(status.HCCL_TIMEOUT, "comm", f"in use ({late.message.rstrip('.')})", rule, fix)

    def find(self, name: str, device: int) -> int:
        """The end of a group that a device holds, by the group's name; of the only one there is, if not by that device.

        Raises:
            AclError: no such group is open here (HCCL_E_NOT_FOUND).
        """
        ends: dict[int, int] = {}
        for handle in self.handles.handles():
            end = self.handles.get("comm", handle)
            if end.transport.name == name:
                ends[end.device] = handle
        if device in ends or len(ends) == 1:
            return ends.get(device, next(iter(ends.values())))
        rule = f"must be the name of a group of which device {device} is a member"
        fix = "pass what HcclGetCommName says"
        raise acl_error(status.HCCL_NOT_FOUND, "group", repr(name), rule, fix)

    def device_of(self, name: str | None, rank: int) -> int | None:
        """The device that holds a rank of a named group, None when no group of ours has that name."""
        for communicator in self.handles.values():
            if communicator.transport.name == name and communicator.transport.rank == rank:
                return communicator.device
        return None

    def finish(self) -> None:
        """Close all of them."""
        for communicator in self.handles.values():
            _close(communicator)
        self.handles.clear()
        self._roots.clear()

    def _add(self, device: int, transport: Transport) -> int:
        register(transport)
        return self.handles.add(Communicator(device, transport))


def _close(communicator: Communicator) -> None:
    unregister(communicator.transport)
    communicator.transport.close()


@dataclass(frozen=True)
class _Root:
    """Where the processes of a group meet: a port of this host, a name, and the process that holds it."""

    port: int
    group: str
    process: int

    def text(self) -> str:
        return json.dumps({_KEY: vars(self)})

    def store(self, join_s: float) -> TCPStore:
        try:  # the store's own client would go on trying until its time-out
            socket.create_connection((_HOST, self.port), timeout=5).close()
            return TCPStore(_HOST, self.port, None, False, timedelta(seconds=join_s), wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            raise self.gone() from error

    def gone(self) -> AclError:
        value = f"of process {self.process}, which does not answer"
        rule = "must be of a process of this host that has not ended"
        fix = "let the root live until all ranks have come"
        return acl_error(status.HCCL_TCP_CONNECT, "rootInfo", value, rule, fix)


def _root_of(text: str) -> _Root:
    try:
        root = json.loads(text)[_KEY]
        return _Root(int(root["port"]), str(root["group"]), int(root["process"]))
    except (ValueError, KeyError, TypeError):
        value = "another text" if text else "empty"
        rule, fix = "must be what HcclGetRootInfo wrote", "send it from the root to all ranks, all of its bytes"
        raise acl_error(status.HCCL_PARA, "rootInfo", value, rule, fix) from None
