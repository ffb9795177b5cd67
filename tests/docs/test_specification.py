"""Every § that a comment, a docstring, a test or a page cites is a section of docs/specification.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("src", "tests", "tools", "docs", "benchmarks", "examples", "README.md", "CHANGELOG.md")
ENDINGS = {".py", ".md", ".cpp", ".h", ".json", ".toml"}
SECTION = re.compile(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", re.MULTILINE)
CITATION = re.compile(r"§\s?(\d+(?:\.\d+)*)?")


def sections() -> list[str]:
    return SECTION.findall((ROOT / "docs" / "specification.md").read_text("utf-8"))


def cited(text: str) -> list[str]:
    """The numbers behind each §; "" where none follows."""
    return [found.group(1) or "" for found in CITATION.finditer(text)]


def files() -> list[Path]:
    found = []
    for place in PLACES:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*"))
    return [path for path in found if path.suffix in ENDINGS and path != Path(__file__)]


def test_every_section_cited_is_there():
    known = set(sections())
    wrong = {
        f"{path.relative_to(ROOT)}: §{number}"
        for path in files()
        for number in cited(path.read_text("utf-8"))
        if number not in known and not (number == "" and path.name == "specification.md")
    }
    assert not wrong


def test_sections_are_numbered_once_and_in_order():
    numbers = [tuple(map(int, number.split("."))) for number in sections()]
    assert numbers == sorted(set(numbers))
    for number in numbers:
        assert len(number) == 1 or number[:1] in numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("as §2.5 and §3 say", ["2.5", "3"]),
        ("(§1.2, §1.7).", ["1.2", "1.7"]),
        ("the end of §4.", ["4"]),
        ("§ 7", ["7"]),
        ("a § alone", [""]),
        ("none", []),
    ],
)
def test_citations_are_read_from_prose(text, numbers):
    assert cited(text) == numbers
