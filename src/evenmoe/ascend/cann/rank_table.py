"""Rank tables, which name the ranks of a group, and how the processes of one find each other."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from evenmoe.ascend import status
from evenmoe.ascend.status import AclError, acl_error

_POLL_S = 0.02


def read_rank_table(path: str, rank: int) -> tuple[int, str]:
    """(ranks of the group, digest of the table) of a rank table in JSON, version 1.0.

    Raises:
        AclError: a file that cannot be read (HCCL_E_OPEN_FILE_FAILURE); no rank table, or one without this rank
            (HCCL_E_PARA); ranks on several servers (HCCL_E_NOT_SUPPORT).
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        value = f"{path!r} ({getattr(error, 'strerror', None) or error})"
        raise acl_error(status.HCCL_OPEN_FILE, "clusterInfo", value, "must be readable", "pass its path") from None
    try:
        servers = [server["device"] for server in json.loads(content)["server_list"]]
        ranks = sorted(int(device["rank_id"]) for devices in servers for device in devices)
    except (ValueError, KeyError, TypeError):
        ranks, servers = [], []
    if not ranks or ranks != list(range(len(ranks))):
        rule = "must be a rank table: a server_list of devices whose rank_id are 0, 1, ... without a gap"
        raise acl_error(status.HCCL_PARA, "clusterInfo", repr(path), rule, "write it as CANN's documentation says")
    if len(servers) > 1:
        value, rule = (
            f"{path!r}, a table of {len(servers)} servers",
            "must have one: groups over several hosts are not emulated",
        )
        raise acl_error(status.HCCL_NOT_SUPPORT, "clusterInfo", value, rule, "name all ranks under one server")
    if not 0 <= rank < len(ranks):
        rule = f"must be 0 to {len(ranks) - 1}, as in the table"
        raise acl_error(status.HCCL_PARA, "rank", rank, rule, "number the ranks from 0")
    return len(ranks), hashlib.sha256(content).hexdigest()[:24]


@contextlib.contextmanager
def announced(digest: str, root_info: str) -> Iterator[str]:
    """Let the other processes of a table find `root_info` in the block, which rank 0 enters.

    The file is locked while it holds: the kernel ends the lock with the process, so that nobody takes for living what
    a killed one has left.

    Raises:
        AclError: another group of the same table is being opened (HCCL_E_PARA), or no folder for it
            (HCCL_E_OPEN_FILE_FAILURE).
    """
    path = _place(digest)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + 1.0  # who looks whether a lock is held holds it for a moment
        while not _locks(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > end:
                rule = "must serve one group at a time on a host"
                fix = "start the next program once the ranks of the first have come, or give it a table of its own"
                raise acl_error(status.HCCL_PARA, "clusterInfo", "in use by another rank 0", rule, fix)
            time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, root_info.encode() + b"\n")
        try:
            yield root_info
        finally:
            os.ftruncate(descriptor, 0)
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def found(digest: str, patience_s: float) -> str:
    """The root info of a table's rank 0, once it has come.

    Raises:
        AclError: it did not come in time (HCCL_E_TIMEOUT).
    """
    end = time.monotonic() + patience_s
    path = _place(digest)
    while True:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not _locks(descriptor, fcntl.LOCK_SH):
                    text = os.read(descriptor, 4096).decode()
                    if text.endswith("\n"):
                        return text
            finally:
                os.close(descriptor)
        if time.monotonic() > end:
            message = f"Rank 0 of the rank table did not come within {patience_s:.0f} s: start all of its ranks."
            raise AclError(status.HCCL_TIMEOUT, message)
        time.sleep(_POLL_S)


def _locks(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _place(digest: str) -> Path:
    """Where the processes of one user on one host look, in a folder that is nobody else's."""
    folder = Path(tempfile.gettempdir(), f"evenmoe-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise _unusable(folder, error.strerror) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise _unusable(folder, "it is another user's")
    return folder / f"hccl-{digest}"


def _unusable(folder: Path, why: str | None) -> AclError:
    message = f"The ranks of a rank table meet in {folder}, which cannot be used: {why}."
    return AclError(status.HCCL_OPEN_FILE, message)
