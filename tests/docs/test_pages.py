"""The pages for whoever carries the project on: their examples run, and what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.running import runner
from tools import house

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md", DOCS / "extending.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:src|tests|tools|benchmarks|docs|\.ci)/[\w./]+)`", page.read_text("utf-8"))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_package_stands_in_the_drawing_and_on_a_floor():
    packages = {house.package_of(module) for module in house.modules_of(ROOT / "src")} - {""}
    drawing = BLOCK.search((DOCS / "architecture.md").read_text("utf-8"))
    assert drawing is not None
    assert packages - {"__main__"} <= set(re.findall(r"\w+", drawing.group(2)))
    assert packages <= {package for floor in house.FLOORS for package in floor}


def test_the_examples_of_extending_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run, commands = runner(monkeypatch, capsys), 0
    for language, text in BLOCK.findall((DOCS / "extending.md").read_text("utf-8")):
        if language:
            Path(text.partition("\n")[0].removeprefix("# ")).write_text(text)
            continue
        for line in text.splitlines():
            if "-m pytest" in line:
                assert all((ROOT / path).exists() for path in line.split() if path.startswith("tests"))
                continue
            done = run(*shlex.split(line)[1:])
            assert done.code == 0, done.err
            commands += 1
    assert commands == 5
