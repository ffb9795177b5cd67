"""Ctrl-C ends every command, wherever it is: exit code 130, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from evenmoe.cli import chain
from tests.cli.processes import forked
from tests.cli.running import SMALL
from tests.traces.npz import at, npz

#: Runs evenmoe, and interrupts it when it begins to import a module.
WHILE_IMPORTING = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
at, sys.argv[:] = sys.argv[1], ["evenmoe", *sys.argv[2:]]
hit = False
def hook(event, arguments):
    global hit
    if event == "import" and arguments[0] == at and not hit:
        hit = True
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
runpy.run_module("evenmoe", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def load(tmp_path) -> Path:
    return at(tmp_path / "load.npz", npz(load=[[[70, 10, 10, 10]]]))


@pytest.mark.parametrize(
    "module",
    [
        "evenmoe.cli",
        "typer",
        "evenmoe.cli.options",
        "evenmoe.formats.catalogue",
        "rich.console",
        "numpy",
        "evenmoe.compiled",
        "numba",
        "llvmlite.binding",
        "evenmoe.metrics",
    ],
)
def test_while_a_module_is_imported(tmp_path, load, module):
    """Most of the first second; an exception would have to pass through the import of libraries in C."""
    command = [sys.executable, "-c", WHILE_IMPORTING, module]
    command += ["plan", str(load), "--ranks", "2", "--slots", "6", "-o", str(tmp_path / "plan.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["load.npz"]


def interrupting(place: str, number: int = signal.SIGINT) -> Callable[[], None]:
    """Before a process starts: let it be interrupted when it calls a function, `module:name`, which then goes on."""

    def start() -> None:
        module, _, path = place.partition(":")
        owner: Any = import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        right = getattr(owner, name)

        def wrong(*given: Any, **named: Any) -> Any:
            os.kill(os.getpid(), number)
            return right(*given, **named)

        setattr(owner, name, wrong)
        for size, value in SMALL.items():
            setattr(chain, size, value)

    return start


FIRST, SECOND = '{"physical_to_logical_map": [[0, 1]]}', '{"physical_to_logical_map": [[1, 0]]}'
REPLAY = ["simulate", "{load}", "--ranks", 2, "--slots", 6, "--steps", 3, "--top-k", 2, "--hidden", 4, "--workers", 2]
REPLAY += ["--expert-bytes", 8, "--expert-flops", 8]
PLACES = {
    "reading": (["check", "{load}"], "evenmoe.formats.document:read_bytes"),
    "comparing": (["diff", FIRST, SECOND, "--ranks", 2], "evenmoe.formats.difference:diff"),
    "planning": (["plan", "{load}", "--ranks", 2, "--slots", 6], "evenmoe.planner.plan:plan_with"),
    "replaying": (REPLAY, "evenmoe.simulator.run:Run.advance"),
    "replaying in a thread": (REPLAY, "evenmoe.simulator.run:Run._count"),
    "ranks that wait": (["demo", "--trace", "{load}", "--ranks", 2], "evenmoe.cli.chain:_one_rank"),
    "making a trace": (
        ["synthesize", "-o", "new.npz", "--windows", 2, "--num-layers", 1],
        "evenmoe.cli.synthesize:_statistics",
    ),
    "printing": (["check", "{load}"], "evenmoe.cli.check:_print_findings"),
}


@pytest.mark.parametrize("place", PLACES)
def test_while_it_works(tmp_path, load, place):
    arguments, function = PLACES[place]
    room = tmp_path / "room"
    room.mkdir()
    done = forked(room, [load if argument == "{load}" else argument for argument in arguments], interrupting(function))
    assert (done.code, done.err) == (130, "")
    assert {path.name for path in room.iterdir()} <= {"new.npz"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_ends(tmp_path, load, number, code):
    done = forked(tmp_path, ["check", load], interrupting("evenmoe.formats.document:read_bytes", number))
    assert (done.code, done.err) == (code, "")


def test_what_a_parent_ignores_stays_ignored(tmp_path, load):
    """A shell's background job, or one under nohup."""

    def start() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
            interrupting("evenmoe.formats.document:read_bytes", number)()

    assert forked(tmp_path, ["check", load], start).code == 0


def test_a_terminal_gets_its_cursor_back(tmp_path, load):
    """A progress bar hides it."""
    ours, theirs = os.openpty()
    shown = bytearray()

    def read() -> None:
        """All the while, since a terminal that nobody reads blocks its writers after 4 KiB."""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while piece := os.read(ours, 4096):
                shown.extend(piece)

    def start() -> None:
        os.dup2(theirs, 2)
        interrupting("evenmoe.simulator.run:Run.advance")()

    command = [load if argument == "{load}" else argument for argument in REPLAY]
    reader = threading.Thread(target=read)
    reader.start()
    try:
        code = forked(tmp_path, command, start).code
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    assert code == 130
    assert b"Traceback" not in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")
