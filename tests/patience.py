"""Waiting in tests: for something to happen, however long a busy machine takes for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

#: Seconds after which a test hangs. Nothing is measured with it: it ends what would never end by itself.
HANG_S = 300.0


def until(happened: Callable[[], bool]) -> None:
    """Wait until `happened()` is true.

    Raises:
        AssertionError: it is not, after HANG_S.
    """
    end = time.monotonic() + HANG_S
    while not happened():
        assert time.monotonic() < end, "what the test waits for never happened"
        time.sleep(0.001)


def until_it_waits(thread: threading.Thread, where: str) -> None:
    """Wait until a thread is blocked in a condition that the function named `where` waits for."""

    def waits() -> bool:
        frame = sys._current_frames().get(thread.ident or 0)
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        return names[:2] == ["wait", where]

    until(waits)


def runs(pid: str) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
