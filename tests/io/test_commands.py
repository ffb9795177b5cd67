"""`run`: what a command prints, and that nothing that it has started goes on when the call does not end by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evenmoe.io.commands import run
from tests.patience import runs, until

#: A command whose own child, whose number it writes, would go on for longer than `until` waits; then it does `{}`.
WAITS = "sleep 1000 & echo $! > pid.part; mv pid.part pid; {}; wait"
#: A process of its own that such a command ends, so that no signal is for the tests' process.
PROGRAM = """
import os, signal, subprocess, sys
from evenmoe.io import commands, output
signal.signal(signal.SIGINT, signal.default_int_handler)
{first}
try:
    commands.run(["sh", "-c", sys.argv[1]])
except BaseException as error:
    print(type(error).__name__)
"""
UNDOES = """
def end(number, frame):
    output.undo_all()
    os._exit(128 + number)
signal.signal(signal.SIGTERM, end)
"""
#: A signal that comes before anybody knows of the process.
WHILE_IT_STARTS = """
class Started(subprocess.Popen):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        while not os.path.exists("pid"):
            pass
        os.kill(os.getpid(), signal.SIGINT)
subprocess.Popen = Started
"""


def test_what_it_prints_and_how_it_ends(tmp_path):
    done = run(["sh", "-c", r"printf 'a\377'; pwd >&2; exit 3"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\N{REPLACEMENT CHARACTER}", f"{tmp_path}\n")


def test_options_are_popens():
    done = run(["sh", "-c", "echo $ONE; echo two >&2"], env={"ONE": "one"}, stderr=subprocess.STDOUT)
    assert (done.stdout, done.stderr) == ("one\ntwo\n", None)


def test_it_needs_a_program(tmp_path):
    with pytest.raises(FileNotFoundError):
        run([tmp_path / "none"])


def test_time():
    done = run(["sh", "-c", "sleep 1000 & sleep 1000"], timeout_s=0.0)
    assert done.returncode == -signal.SIGKILL


def test_in_another_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(run(["echo", "1"])))
    thread.start()
    thread.join()
    assert done[0].stdout == "1\n"


@pytest.mark.parametrize(
    ("first", "ending", "code", "said"),
    [
        ("", "kill -INT $PPID", 0, "KeyboardInterrupt\n"),
        (UNDOES, "kill -TERM $PPID", 128 + signal.SIGTERM, ""),
        (WHILE_IT_STARTS, ":", 0, "KeyboardInterrupt\n"),
    ],
    ids=["an exception", "undo_all", "a signal while it starts"],
)
def test_nothing_goes_on(tmp_path, first, ending, code, said):
    command = [sys.executable, "-c", PROGRAM.format(first=first), WAITS.format(ending)]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")
    child = Path(tmp_path, "pid").read_text().strip()
    until(lambda: not runs(child))
