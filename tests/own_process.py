"""Figures of a process, measured in a process of its own: in the suite's, they depend on what ran there before."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["evenmoe.formats", "numpy", "torch"])  # once, not in every process


def peak_bytes(work: Callable[[Any], object], large: Any, small: Any) -> int:
    """Resident memory that `work(large)` needs beyond what the process has after `work(small)`.

    Args:
        work: a function of a module; the new process imports that module, so it should be a light one.
        large: what is measured; small: of the same kind, so that code is loaded before.
    """
    ours, theirs = _SERVER.Pipe(duplex=False)
    child = _SERVER.Process(target=_measure, args=(theirs, work, large, small), daemon=True)
    child.start()
    theirs.close()
    try:
        figure = ours.recv()
    except EOFError:
        figure = None
    child.join()
    assert child.exitcode == 0, f"the process that measures ended with {child.exitcode}"
    assert figure is not None
    return figure


def _measure(pipe: Connection, work: Callable[[Any], object], large: Any, small: Any) -> None:
    work(small)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that is free inside the process would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _field("VmRSS")
    work(large)
    pipe.send(_field("VmHWM") - before)


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
