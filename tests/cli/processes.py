"""`evenmoe` in a process of its own that is forked from the test's, so that nothing has to be imported anew."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from evenmoe.cli import COMMANDS

#: What commands import when they run: here once, instead of in every process.
MODULES = (
    *(f"evenmoe.cli.{command}" for command in COMMANDS),
    "evenmoe.cli.chain",
    "evenmoe.cli.trace_source",
    "evenmoe.ascend.cann.build",
    "evenmoe.formats.writing",
    "evenmoe.formats.difference",
    "evenmoe.formats.tensorrt_llm",
    "evenmoe.planner.plan",
    "evenmoe.report.pictures",
    "evenmoe.simulator.replay",
    "evenmoe.simulator.store",
    "evenmoe.traces.synthesis",
)

_PATIENCE_S = 300  # with a process that hangs, where one that compiles anew takes up to 100: it is then killed


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it; and what it printed."""

    code: int
    out: str
    err: str


def forked(folder: Path, arguments: Sequence[Any], before: Callable[[], None] = lambda: None) -> Ended:
    """Run `evenmoe *arguments` in `folder`; `before` is called in the new process first."""
    for module in MODULES:
        import_module(module)
    pipes = os.pipe(), os.pipe()  # and not files, which a limit or a full disk would hold for outputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of fork with threads, which are not used
        child = os.fork()
    if child == 0:
        _child(folder, [str(argument) for argument in arguments], [write for _, write in pipes], before)
    for _, write in pipes:
        os.close(write)
    with ThreadPoolExecutor(2) as readers:
        printed = list(readers.map(_read, [read for read, _ in pipes]))
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *printed)


def _read(pipe: int) -> str:
    with os.fdopen(pipe, "rb") as file:
        return file.read().decode(errors="replace")


def _child(folder: Path, arguments: list[str], pipes: list[int], before: Callable[[], None]) -> None:
    """Never returns: whatever happens, pytest must not go on in here."""
    code = 1
    try:
        for number, pipe in zip((1, 2), pipes, strict=True):
            os.dup2(pipe, number)
            os.close(pipe)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(folder)
        sys.dont_write_bytecode = True  # Python installs bytecode that a limit has cut, and would stumble over it later
        # As in a terminal, whatever the suite was started with: a background job ignores them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(_PATIENCE_S)
        sys.argv = ["evenmoe", *arguments]
        before()
        runpy.run_module("evenmoe", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
