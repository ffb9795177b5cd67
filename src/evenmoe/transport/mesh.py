"""Idle connections between the processes of a group, from which a rank learns whose process has ended.

No backend of torch.distributed says who is gone: gloo's text names a port, and in a cascade another rank's. The kernel
closes a process's connections however it ends, so the end of one is sure. A rank that stops by its own decision first
says why, in a last word, so that its end is not taken for the cause.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from evenmoe.transport.segment import Gather, this_host

_CONNECT_S = 5.0  # for one connection; a host that does not answer by then is behind a firewall
_SETTLE_S = 0.05  # two processes killed together are seen together: their ends were 0.1 to 6 ms apart in 150 kills
_HELLO = struct.Struct("<16sI")
_LONGEST_WORD = 4096


@dataclass(frozen=True)
class LastWord:
    """What a rank says before it makes no exchange any more.

    Attributes:
        reason: follows the rank in a sentence.
        by_itself: whether it stopped through its own fault or decision.
        because_of: else the ranks that made it stop, as far as it knows.
        timed_out: whether it waited in vain, so that whoever says nothing now is the cause.
    """

    reason: str
    by_itself: bool = True
    because_of: tuple[int, ...] = ()
    timed_out: bool = False


@dataclass
class _Peer:
    connection: socket.socket
    received: bytes = b""
    word: LastWord | None = None
    ended: bool = False


class Mesh:
    """One rank's connections to the other processes of its group; ranks that could not be reached have none."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers = {rank: _Peer(connection) for rank, connection in peers.items()}
        _open_meshes().add(self)

    def say(self, word: LastWord) -> None:
        """Leave a last word with every rank that still listens."""
        text = json.dumps([word.reason[:1000], word.by_itself, word.because_of, word.timed_out]).encode() + b"\n"
        for peer in self._peers.values():
            with suppress(OSError):
                peer.connection.send(text[:_LONGEST_WORD], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def stopped(self, patience_s: float, all_silent: bool = False) -> dict[int, LastWord]:
        """Wait until some rank has stopped by itself, and say which have and why.

        Args:
            patience_s: seconds to wait for the first.
            all_silent: whether ranks that say nothing in that time have stopped too, as after a time-out.

        Returns:
            {rank: its last word, or what its silence means}; empty if it cannot be told.
        """
        deadline = time.monotonic() + patience_s
        while True:
            self._read(max(0.0, deadline - time.monotonic()))
            if self._guilty():
                self._read_for(_SETTLE_S)
                return self._guilty()
            if time.monotonic() >= deadline or all(peer.ended for peer in self._peers.values()):
                break
        if all_silent or any(peer.word.timed_out for peer in self._peers.values() if peer.word):
            silent = [rank for rank, peer in self._peers.items() if not peer.ended and peer.word is None]
            if silent:
                return {rank: LastWord("did not call") for rank in silent}
        blamed = {rank for peer in self._peers.values() if peer.word for rank in peer.word.because_of}
        known = {rank: self._peers[rank] for rank in sorted(blamed) if rank in self._peers}
        return {rank: peer.word or LastWord("another rank lost") for rank, peer in known.items()}

    def stopped_already(self, ranks: Iterable[int]) -> bool:
        """Whether one of `ranks` has ended or left a last word, as far as it is known now."""
        self._read(0.0)
        return any(rank in self._peers and (self._peers[rank].ended or self._peers[rank].word) for rank in ranks)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()

    def _guilty(self) -> dict[int, LastWord]:
        found = {}
        for rank, peer in sorted(self._peers.items()):
            if peer.word is not None and peer.word.by_itself:
                found[rank] = peer.word
            elif peer.ended and peer.word is None:
                found[rank] = LastWord("ended: its process is gone")
        return found

    def _read_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0 and self._read(remaining):
            pass

    def _read(self, patience_s: float) -> bool:
        """Take in what has come, waiting for something; False if there is nobody left to wait for."""
        open_peers = {peer.connection.fileno(): peer for peer in self._peers.values() if not peer.ended}
        if not open_peers:
            return False
        waiting = select.poll()  # not select.select, which ends at 1,024 open files
        for file in open_peers:
            waiting.register(file, select.POLLIN)
        for file, _ in waiting.poll(1000 * patience_s):
            peer = open_peers[file]
            try:
                some = peer.connection.recv(_LONGEST_WORD, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                some = b""
            peer.ended = not some
            peer.received += some
            *words, peer.received = peer.received.split(b"\n")
            if words:  # the later ones know more
                reason, by_itself, because_of, timed_out = json.loads(words[-1])
                peer.word = LastWord(reason, by_itself, tuple(because_of), timed_out)
        return True


def connect(rank: int, world_size: int, gather: Gather) -> Mesh:
    """Connect every two processes of a group; a collective of the group.

    Args:
        gather: a value of this rank -> those of all ranks, in rank order; called twice.
    """
    hosts = gather({"host": this_host()})
    one_host = len({str(host) for host in hosts}) == 1
    family = socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with listener:
        listener.bind(("127.0.0.1" if one_host else "", 0))
        listener.listen(world_size)
        token = secrets.token_hex(16)
        addresses = ["127.0.0.1"] if one_host else _addresses()
        known = gather({"addresses": addresses, "port": listener.getsockname()[1], "token": token})
        peers: dict[int, socket.socket] = {}
        for other in range(rank):
            reached = _reach(known[other], rank)
            if reached is not None:
                peers[other] = reached
        listener.settimeout(_CONNECT_S)
        deadline = time.monotonic() + _CONNECT_S
        while sum(other > rank for other in peers) < world_size - 1 - rank and time.monotonic() < deadline:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            other = _greeted(connection, token)
            if other is None or not rank < other < world_size:
                connection.close()
            else:
                peers[other] = connection
    for connection in peers.values():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # a host that is gone sends no end, so ask it every few seconds
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Mesh(peers)


def _reach(known: dict[str, object], rank: int) -> socket.socket | None:
    addresses, port, token = known["addresses"], known["port"], known["token"]
    assert isinstance(addresses, list)
    assert isinstance(port, int)
    assert isinstance(token, str)
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection((address, port), timeout=_CONNECT_S)
            connection.settimeout(None)
            connection.sendall(_HELLO.pack(bytes.fromhex(token), rank))
            return connection
    return None


def _greeted(connection: socket.socket, token: str) -> int | None:
    """The rank at the other end, if it is one of this group."""
    connection.settimeout(_CONNECT_S)
    try:
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        connection.settimeout(None)
    except OSError:
        return None
    if len(hello) != _HELLO.size:
        return None
    shown, rank = _HELLO.unpack(hello)
    return rank if secrets.compare_digest(shown, bytes.fromhex(token)) else None


def _addresses() -> list[str]:
    """Addresses under which other hosts may reach this one, the likeliest first."""
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737): nothing is sent, a route is chosen
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys(found))


@cache
def _open_meshes() -> weakref.WeakSet[Mesh]:
    """All meshes of this process. Forked children close theirs: held open, they would make a dead rank look alive."""
    meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()

    def close_all() -> None:
        for mesh in list(meshes):
            mesh.close()

    os.register_at_fork(after_in_child=close_all)
    return meshes
