"""The README's example prints what the README says, and the pictures are what their script draws."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_example_prints_its_output(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    script = tmp_path / "example.py"
    script.write_text(code)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == printed


def test_pictures_are_up_to_date(tmp_path: Path) -> None:
    script = tmp_path / "picture.py"
    script.write_text((ROOT / "docs" / "picture.py").read_text())
    runpy.run_path(str(script), run_name="__main__")
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 5
    for picture in drawn:
        assert picture.read_bytes() == (ROOT / "docs" / picture.name).read_bytes()


def test_its_drawing_is_what_the_script_writes() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "picture.py"))["text"]()
    assert f"```text\n{drawn}```\n" in (ROOT / "README.md").read_text("utf-8")


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


def test_its_commands_are_the_ones_that_ci_runs() -> None:
    commands = re.search(r"```sh\n(make demo.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test\n" in ci
    assert "\nmake demo\n" in ci
