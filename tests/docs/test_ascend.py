"""The program of docs/ascend.md runs and prints what the page says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.patience import HANG_S

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ascend.md"


def test_the_program_of_the_page_runs(tmp_path):
    page = PAGE.read_text()
    (program,) = re.findall(r"```python\n# run: four ranks\n(.*?)```", page, re.DOTALL)
    (wanted,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    (first_lines,) = re.findall(r"```python\n(import evenmoe.*?)```", page, re.DOTALL)
    assert program.startswith(first_lines)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "program.py"
    script.write_text(program.replace("50021", str(port)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=HANG_S, check=False)
    # Processes that print at once may share a line.
    printed = re.findall(r"rank \d: \d+ became \d+(?:\.\d)?", done.stdout)
    assert sorted(printed) == wanted.splitlines(), done.stderr[-2000:]
    assert done.returncode == 0
