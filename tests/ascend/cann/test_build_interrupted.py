"""`evenmoe cann --out DIR` when it cannot be finished: the tree of an earlier run stays, and nothing is beside it."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.processes import forked
from tests.patience import runs, until

#: Compilers that stand in for g++; each is called in the tree's folder as `g++ … -o TARGET …`.
WRITES = 'while [ "$1" != -o ]; do shift; done; head -c 100 /dev/zero > "$2"'
INTERRUPTED = f'sleep 1000 & echo $! > "$COMPILER_PID"; {WRITES}; kill -INT $PPID; wait'
FULL = "echo 'as: error: can not write: No space left on device' >&2; exit 1"


@pytest.fixture
def room(tmp_path) -> Path:
    (tmp_path / "room" / "latest" / "lib64").mkdir(parents=True)
    (tmp_path / "room" / "latest" / "evenmoe.txt").write_text("Written by `evenmoe cann`\n")
    return tmp_path / "room"


def compiler(tmp_path: Path, script: str) -> Callable[[], None]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "g++").chmod(0o755)

    def start() -> None:
        os.environ.update(PATH=f"{tmp_path}/bin:/usr/bin:/bin", COMPILER_PID=str(tmp_path / "pid"))

    return start


def names(room: Path) -> list[str]:
    return sorted(str(path.relative_to(room)) for path in room.rglob("*"))


def test_a_tree_is_replaced_whole(tmp_path, room):
    assert forked(tmp_path, ["cann", "--out", room], compiler(tmp_path, WRITES)).code == 0
    assert [path.name for path in room.iterdir()] == ["latest"]
    assert {"bin/setenv.bash", "set_env.sh", "evenmoe.txt", "lib64/libascendcl.so"} <= set(names(room / "latest"))


def test_an_interrupt_while_it_compiles(tmp_path, room):
    """What the compiler has started is stopped, too: it would go on for 1000 s, longer than `until` waits."""
    before = names(room)
    done = forked(tmp_path, ["cann", "--out", room], compiler(tmp_path, INTERRUPTED))
    assert (done.code, done.err) == (130, "")
    assert names(room) == before
    waiting = (tmp_path / "pid").read_text().strip()
    until(lambda: not runs(waiting))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("script", "most_bytes", "reason"),
    [
        (FULL, 1 << 20, "No space left on device"),
        (WRITES.replace("100", "2000000"), 1 << 20, "File too large"),
        (WRITES, 1000, "File too large"),
    ],
    ids=["the compiler's disk is full", "the compiler's file is too large", "a header is too large"],
)
def test_no_room(tmp_path, room, script, most_bytes, reason, new):
    out = room / "made" / "for it" if new else room
    before = names(room)
    begin = compiler(tmp_path, script)

    def start() -> None:
        begin()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    done = forked(tmp_path, ["cann", "--out", out], start)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"evenmoe: `--out` is {out}: it must be a directory that can be written ({reason}); use another DIR.\n"
    )
    assert names(room) == before


def test_a_kill_while_it_compiles(tmp_path, room):
    before = names(room)
    done = forked(tmp_path, ["cann", "--out", room], compiler(tmp_path, "kill -KILL $PPID"))
    assert done.code == -signal.SIGKILL
    assert [name for name in names(room) if not name.startswith(".evenmoe-")] == before
