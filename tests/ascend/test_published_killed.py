"""The tools that run public programs, ended while a program runs: the program's own processes end, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import runs, until

ROOT = Path(__file__).parents[2]
#: It would go on for longer than `until` waits.
PYTHON = """import subprocess, torch_npu
from pathlib import Path
child = subprocess.Popen(["sleep", "1000"])
Path({part!r}).write_text(str(child.pid))
Path({part!r}).rename({pid!r})
child.wait()
"""
COMPILER = "#!/bin/sh\nsleep 1000 &\necho $! > {part}\nmv {part} {pid}\nwait\n"


@pytest.fixture
def room(tmp_path) -> Path:
    """What either tool needs: a program, and of the tree only what it looks for."""
    names = {"part": str(tmp_path / "part"), "pid": str(tmp_path / "pid")}
    for name, text in {
        "sources/one.py": PYTHON.format(**names),
        "sources/one.cpp": "aclnnMoeUpdateExpertGetWorkspaceSize()",
        "tree/latest/bin/setenv.bash": "",
        "bin/g++": COMPILER.format(**names),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin" / "g++").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tool", ["published_python", "published_programs"])
def test_the_programs_end_with_the_tool(room, tool, number):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", room / "sources"]
    command += ["--cann", room / "tree"] if tool == "published_programs" else []
    environment = {**os.environ, "PATH": f"{room / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(room / "tmp")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or (room / "pid").exists())
            assert process.poll() is None, "the tool ended before the program did"
            process.send_signal(number)
            until(lambda: process.poll() is not None)
        finally:
            process.kill()
    child = (room / "pid").read_text().strip()
    until(lambda: not runs(child))
    assert list((room / "tmp").iterdir()) == []
