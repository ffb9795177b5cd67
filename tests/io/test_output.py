"""Outputs that are whole or not there, whatever moment the process ends at and whatever the block does."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from evenmoe.io import output
from evenmoe.io.output import made_folder, undo_all, whole_file, whole_files, whole_folder

OLD, NEW = b"old", b"newer"


def write_file(path: Path) -> None:
    with whole_file(path) as file:
        file.write(NEW)


def write_folder(path: Path) -> None:
    with whole_folder(path, replace=True) as folder:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_bytes(NEW)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended_at(event: int, write: Callable[[], None], at_end: Callable[[], None]) -> bool:
    """Run `write` in a process that calls `at_end` and is gone when it asks the kernel for the n-th time for a file.

    Returns: whether there was an n-th time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of fork with threads, which are not used
        child = os.fork()
    if child == 0:
        left = event

        def count(name: str, arguments: tuple) -> None:
            nonlocal left
            if name == "open" or name.startswith(("os.", "ctypes.")):
                left -= 1
                if left == 0:
                    at_end()
                    os._exit(9)

        sys.addaudithook(count)
        try:
            write()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_that_ends_at_any_moment(tmp_path, monkeypatch, kind, exchange):
    """Killed: old or new, and at most a part beside it. Interrupted, which undoes: not even that.

    Only where the system cannot exchange two names in one step is there a moment at which a replaced folder has none;
    it is whole then, too, under the name of a part.
    """
    if not exchange:
        monkeypatch.setattr(output, "_exchanged", lambda *_: False)
    old, new = ({"target": OLD}, {"target": NEW})
    if kind == "folder":
        old, new = {"target/file": OLD}, {"target/deeper/file": NEW}
    moments = 0
    for at_end in (lambda: None, undo_all):
        for event in range(1, 200):
            room = tmp_path / f"{at_end.__name__} {event}"
            for name, data in old.items():
                (room / name).parent.mkdir(parents=True, exist_ok=True)
                (room / name).write_bytes(data)
            write = write_file if kind == "file" else write_folder
            ended = ended_at(event, lambda room=room, write=write: write(room / "target"), at_end)
            found = contents(room)
            at_target = {name: data for name, data in found.items() if not name.startswith(".evenmoe-")}
            if at_target:
                assert at_target in (old, new), event
            else:
                assert (kind, exchange) == ("folder", False), event
                kept = {re.sub(r"^\.evenmoe-[0-9a-f]{16}", "target", name): data for name, data in found.items()}
                assert old.items() <= kept.items()
            if at_end is undo_all and at_target:
                assert found == at_target, event
            if not ended:
                assert at_target == found == new
                break
            moments += 1
        else:
            raise AssertionError("it asks for more than 200 files")
    assert moments >= 8


def fail_in_file(room: Path, error: BaseException) -> None:
    with whole_file(room / "old") as file:
        file.write(NEW)
        raise error


def fail_in_files(room: Path, error: BaseException) -> None:
    with whole_files() as files:
        files.write(room / "other", NEW)
        files.write(room / "old", NEW)
        raise error


def fail_in_folder(room: Path, error: BaseException) -> None:
    with whole_folder(room / "old", replace=True) as folder:
        (folder / "file").write_bytes(NEW)
        raise error


def fail_in_made_folder(room: Path, error: BaseException) -> None:
    with made_folder(room / "a" / "b"):
        assert (room / "a" / "b").is_dir()
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("fail", [fail_in_file, fail_in_files, fail_in_folder, fail_in_made_folder])
def test_a_block_that_fails(tmp_path, fail, error):
    (tmp_path / "old").write_bytes(OLD)
    with pytest.raises(type(error)) as caught:
        fail(tmp_path, error)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == OLD
    if isinstance(error, OSError) and fail in (fail_in_file, fail_in_folder):
        assert isinstance(caught.value, OSError)
        assert caught.value.filename == str(tmp_path / "old")
        assert (caught.value.errno, caught.value.strerror) == (errno.EIO, "broken")


def fail_in_second(room: Path) -> None:
    with whole_files() as files:
        files.write(room / "one", OLD)
        files.write(room / "none" / "two", OLD)


def fail_beside_anothers(room: Path) -> None:
    with made_folder(room / "c"):
        (room / "c" / "anothers").touch()
        raise ValueError("no")


def test_several_files_wait_for_each_other(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(OLD)
    with whole_files() as files:
        files.write(tmp_path / "one", NEW)
        files.write(tmp_path / "two", b"")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == OLD
    assert contents(tmp_path) == {"one": NEW, "two": b""}
    with pytest.raises(FileNotFoundError) as caught:
        fail_in_second(tmp_path)
    assert caught.value.filename == str(tmp_path / "none" / "two")
    assert contents(tmp_path) == {"one": NEW, "two": b""}


def test_made_folders_that_are_kept(tmp_path):
    with made_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(ValueError, match="no"):
        fail_beside_anothers(tmp_path / "a" / "b")
    assert contents(tmp_path) == {"a/b/c/anothers": b""}  # not ours to remove
    with pytest.raises(NotADirectoryError) as caught, made_folder(tmp_path / "a" / "b" / "c" / "anothers"):
        pass
    assert caught.value.filename.endswith("anothers")


def test_a_folder_that_is_not_empty_is_not_replaced_unasked(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(OLD)
    with pytest.raises(OSError, match=r"Directory not empty: '.*/full'$"), whole_folder(tmp_path / "full") as folder:
        (folder / "file").write_bytes(NEW)
    assert contents(tmp_path) == {"full/file": OLD}


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "\udcff", " ", "-"])
def test_names_of_any_kind(tmp_path, name):
    """As long as a name can be, of bytes that are no text, or blank: what the part beside it is called differs."""
    write_file(tmp_path / name)
    write_file(tmp_path / name)
    assert contents(tmp_path) == {name: NEW}


def test_links_that_lead_nowhere(tmp_path):
    """A dangling link makes its target, as opening it would; a loop is an error and stays."""
    (tmp_path / "link").symlink_to("later")
    write_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later").read_bytes() == NEW
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as caught:
        write_file(tmp_path / "loop")
    assert caught.value.filename == str(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()
