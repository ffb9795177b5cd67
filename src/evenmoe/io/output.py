"""Outputs that are whole or not there: `whole_files`, `whole_file` and `whole_folder`.

What is written grows beside its target, reaches the disk, and only then takes the target's name. A failure of any kind
leaves what was there before as it was, and nothing beside it; only a process that is killed outright can leave the
unfinished part, whose name begins with `.evenmoe-`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

#: How errors call it.
STANDARD_OUTPUT = "standard output"
_PREFIX = ".evenmoe-"
_MOST_LINKS = 40  # that Linux follows, too
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # of file systems that cannot be told to reach the disk
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2

#: What undoes the outputs that are being written now, the oldest first.
_undo: list[Callable[[], None]] = []


def undo_all() -> None:
    """Undo whatever is being written at this moment, for a process that is about to end without unwinding."""
    for undo in reversed(_undo):
        undo()


@contextmanager
def undone_by_exit(undo: Callable[[], None]) -> Iterator[None]:
    """Let `undo_all` call `undo` while the block runs."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


class WholeFiles:
    """Files of one block of `whole_files`; each takes its name when the block ends."""

    def __init__(self, leftovers: ExitStack) -> None:
        self._leftovers = leftovers
        self._parts: list[tuple[str | Path, Path, Path]] = []

    @contextmanager
    def open(self, target: str | Path) -> Iterator[BinaryIO]:
        """Open one of the files for writing.

        A symbolic link stays a link: the file behind it is replaced. What is no regular file (a pipe, a device,
        /dev/stdout) has no old content to lose and is written directly.

        Raises:
            OSError: the file cannot be written; `filename` is the target.
        """
        with _named(target):
            path, descriptor = _resolved(target)
            if descriptor is not None:
                # The same open file, so that what is appended to stays, and what follows comes after it.
                with os.fdopen(os.dup(descriptor), "wb") as file:
                    yield file
                return
            old = _status(path)
            if old is not None and not stat.S_ISREG(old.st_mode):
                with path.open("wb") as file:
                    yield file
                return
            if old is not None:  # a file that may not be written is not to be replaced either
                os.close(os.open(path, os.O_WRONLY))
            part = _part_beside(path, self._leftovers)
            with part.open("xb") as file:
                yield file
                if old is not None:
                    _keep_owner_and_mode(file.fileno(), old)
                file.flush()
                _sync(file.fileno())
            self._parts.append((target, path, part))

    def write(self, target: str | Path, content: bytes) -> None:
        """Write one of the files in one piece; as `open`."""
        with self.open(target) as file:
            file.write(content)

    def finish(self) -> None:
        """Give every file its name."""
        for target, path, part in self._parts:
            with _named(target):
                part.replace(path)
        for folder in {path.parent for _, path, _ in self._parts}:
            _sync_folder(folder)


@contextmanager
def whole_files() -> Iterator[WholeFiles]:
    """Write several files, which take their names together, once all of them are complete.

    Raises:
        OSError: one of them cannot be written; `filename` names it, and none of them has changed.
    """
    with ExitStack() as leftovers:
        files = WholeFiles(leftovers)
        yield files
        files.finish()


@contextmanager
def whole_file(target: str | Path) -> Iterator[BinaryIO]:
    """Open one file for writing, which takes its name once it is complete; as `whole_files`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "numbers.txt")
    ...     with whole_file(path) as file:
    ...         _ = file.write(b"1 2 3")
    ...         there_before_it_is_complete = path.exists()
    ...     there_before_it_is_complete, path.read_bytes(), len(os.listdir(folder))
    (False, b'1 2 3', 1)
    """
    with whole_files() as files, files.open(target) as file:
        yield file


@contextmanager
def whole_folder(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a new folder, which takes the name `target` once the block ends.

    Args:
        target: where nothing is yet, or an empty folder; with `replace` a folder of any content, which is removed.

    Raises:
        OSError: the folder cannot be written, or is not empty; `filename` is the target, which has not changed.
    """
    with _named(target), ExitStack() as leftovers:
        path = Path(os.path.realpath(target))
        part = _part_beside(path, leftovers)
        part.mkdir()
        yield part
        for folder, _, names in os.walk(part):
            for name in names:
                _sync_path(Path(folder, name))
            _sync_folder(Path(folder))
        if not (replace and path.exists() and _exchanged(part, path)):
            if replace and path.exists():
                before = _name_beside(path)
                _undo_with(leftovers, partial(_put_back, before, path))
                path.replace(before)
            part.replace(path)
        _sync_folder(path.parent)


@contextmanager
def scratch_folder(inside: Path) -> Iterator[Path]:
    """Make a folder for what is needed only while the block runs."""
    with ExitStack() as leftovers:
        scratch = _part_beside(inside / "scratch", leftovers)
        with _named(inside):
            scratch.mkdir()
        yield scratch


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it that are missing; a block that fails takes those that it left empty with it.

    Raises:
        OSError: a folder cannot be made; `filename` is `path`.
    """
    with ExitStack() as undoing:
        made: list[Path] = []
        _undo_with(undoing, partial(_remove_empty, made))
        with _named(path):
            for folder in reversed([path, *path.parents]):
                if not folder.exists():
                    made.append(folder)
                    folder.mkdir(exist_ok=True)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield
        made.clear()


def write_standard_output(content: bytes) -> None:
    """Write bytes to standard output. Raises OSError, whose `filename` is "standard output"."""
    with _named(STANDARD_OUTPUT):
        if sys.stdout is None:  # closed before Python started
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


@contextmanager
def _named(target: str | Path) -> Iterator[None]:
    """Let errors name the target and not the part of it that is unfinished."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(target):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _resolved(target: str | Path) -> tuple[Path, int | None]:
    """The path behind all symbolic links; and where they end in a descriptor of this process, its number."""
    own_descriptors = os.path.realpath("/proc/self/fd")
    path = Path(target)
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if folder == own_descriptors and path.name.isdecimal():
            return path, int(path.name)
        if not path.is_symlink():
            break
        path = Path(folder, path.readlink())
    return Path(os.path.realpath(target)), None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _part_beside(path: Path, leftovers: ExitStack) -> Path:
    """The path of what is removed if it is still there in the end."""
    part = _name_beside(path)
    _undo_with(leftovers, partial(_remove, part))
    return part


def _name_beside(path: Path) -> Path:
    """A new name in the same folder, hence on the same disk; short, since the path's may be as long as names can be."""
    return path.parent / f"{_PREFIX}{secrets.token_hex(8)}"


def _undo_with(leftovers: ExitStack, undo: Callable[[], None]) -> None:
    """Undo something when the stack is closed, or by `undo_all` before."""
    leftovers.enter_context(undone_by_exit(undo))
    leftovers.callback(undo)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether two folders could exchange their names in one step, so that at no moment one is missing."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library without it
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _keep_owner_and_mode(descriptor: int, old: os.stat_result) -> None:
    with suppress(PermissionError):  # only root gives files away
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """So that the new name outlives a loss of power; a folder that cannot be opened is whole without it."""
    with suppress(OSError):
        _sync_path(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _put_back(before: Path, path: Path) -> None:
    """Give a replaced folder its name again, where nothing has taken it yet; else remove it."""
    if before.exists() and not path.exists():
        before.replace(path)
    else:
        _remove(before)


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()
