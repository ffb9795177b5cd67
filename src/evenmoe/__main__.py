"""The program `evenmoe`, which is also `python -m evenmoe`: a process of its own for one command."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from evenmoe.io.output import undo_all

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
# New objects after which cycles are looked for. At Python's 700, a short `simulate` spends 5 % of its time on looking
# through what imports and compiled kernels make, which stays.
_OBJECTS = 50_000
_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


def start() -> None:
    """Run a command; an interrupt ends the process at once, with what was unfinished removed."""
    for name in _ENDING:
        number = getattr(signal, name, None)
        # What a parent set to be ignored (nohup, a shell's background) stays ignored.
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
    gc.set_threshold(_OBJECTS)
    from evenmoe.cli import main  # an interrupt while it is imported is one, too

    main()


def _end(number: int, frame: FrameType | None) -> None:
    """End here and now: an exception would first have to find its way out of threads, imports and C libraries."""
    undo_all()
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())
    os._exit(128 + number)


if __name__ == "__main__":
    start()
