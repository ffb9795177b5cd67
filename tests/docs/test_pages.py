"""The pages for whoever carries the project on: their examples run, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.running import runner
from tests.docs.blocks import Page, blocks_of, like
from tools import house

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md", DOCS / "extending.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:src|tests|tools|benchmarks|docs|\.ci)/[\w./]+)`", page.read_text("utf-8"))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_package_stands_in_the_drawing_and_on_a_floor():
    packages = {house.package_of(module) for module in house.modules_of(ROOT / "src")} - {""}
    drawing = blocks_of((DOCS / "architecture.md").read_text("utf-8"))[0].text
    assert packages - {"__main__"} <= set(re.findall(r"\w+", drawing))
    assert packages <= {package for floor in house.FLOORS for package in floor}


#: What runs its page as a program of several processes, with a test of its own.
ELSEWHERE = {"ascend.md"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem
)
def test_every_block_of_a_page_runs_or_is_output(page, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    blocks = blocks_of(page.read_text("utf-8"))
    if page.name in ELSEWHERE:
        assert {block.kind for block in blocks} <= {"python", "text"}
        return
    reader = Page(runner(monkeypatch, capsys))
    for block in blocks:
        reader.take(block)
    assert reader.commands == sum(block.text.count("evenmoe ") for block in blocks if block.kind == "sh")


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```\n1\n```\n", AssertionError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```sh\nevenmoe plan absent.json\n```\n", AssertionError),
        ("```sh\npip install 'evenmoe[absent]'\n```\n", AssertionError),
        ("```sh\npython benchmarks/absent.py\n```\n", AssertionError),
        ("```sh\nfrobnicate\n```\n", AssertionError),
        ('```python title="examples/transformers_replicas.py"\nabsent()\n```\n', AssertionError),
    ],
)
def test_a_block_that_is_wrong_is_found(page, error, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    reader = Page(runner(monkeypatch, capsys))
    *before, wrong = blocks_of(page)
    for block in before:
        reader.take(block)
    with pytest.raises(error):
        reader.take(wrong)


def test_outputs_are_compared_line_by_line():
    assert like("a\n…\nc\n", "a\nb\nb\nc\n")
    assert like("a\n", "a  \n")
    assert not like("a\n…\nd\n", "a\nb\nc\n")
    assert not like("a\n", "a\nb\n")
