"""`run`: other programs, none of which outlives what waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

from evenmoe.io.output import undone_by_exit

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_KILLED_S = 10.0  # to be gone after SIGKILL, with all that may still write; a disk that hangs takes longer


def run(
    command: Sequence[str | os.PathLike[str]], *, timeout_s: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command and read what it prints.

    It is in a session of its own, of which all processes are killed when the call does not end by itself: by an
    exception, a signal's above all, by `evenmoe.io.output.undo_all`, or by the time.

    Args:
        command: the program and its arguments.
        timeout_s: seconds after which the processes are killed; None for never.
        options: of `subprocess.Popen`, such as cwd and env.

    Returns:
        Exit code (minus SIGKILL after `timeout_s`), standard output and standard error, of which undecodable bytes are
        replaced.

    Raises:
        OSError: the program cannot be started.

    >>> done = run(["sh", "-c", "echo one; echo two >&2; exit 3"])
    >>> done.returncode, done.stdout, done.stderr
    (3, 'one\\n', 'two\\n')
    """
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with ExitStack() as ending:
        with _signals_wait():
            process = ending.enter_context(subprocess.Popen(command, start_new_session=True, **pipe | options))
            kill = partial(_kill_session, process)
            ending.enter_context(undone_by_exit(kill))
            ending.callback(kill)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            kill()
            out, err = "", ""
            with suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=_KILLED_S)  # until nobody holds the pipes
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return subprocess.CompletedProcess(command, -signal.SIGKILL, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Before the first process is waited for, since its number may be another's afterwards."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let what ends this process wait for the block's end: a process that is just being started would be nobody's."""
    came: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)

    mine = threading.current_thread() is threading.main_thread()  # no other thread may touch handlers
    handlers = {number: signal.getsignal(number) for number in _ENDING if mine}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
