"""`tools/house.py` counts what it says; tests stand where their module does, and speak the field's words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import house

SIX = "a = 1\nb = 2\nc = a + b\nd = c * a\n\n# between\ne = d - 1\nf = e + d\n"


def figures_of(folder: Path, files: dict[str, str]) -> dict[str, house.Figure]:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "src" / "evenmoe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {figure.name: figure for figure in house.source_figures(folder / "src")}


def test_a_sound_house_has_nothing_to_mend(tmp_path):
    found = figures_of(tmp_path, {"errors.py": "x = 1\n", "metrics.py": "from evenmoe.errors import x\n\ny = x\n"})
    assert found["modules"].value == 3
    assert found["lines"].value == 4
    for name in ("imports upward", "circles", "duplicate runs of six lines", "Any", 'given["…"]'):
        assert found[name].value == 0, name


def test_a_circle_is_found_also_where_only_types_close_it(tmp_path):
    back = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from evenmoe.planner import plan\n"
    found = figures_of(tmp_path, {"planner/plan.py": "import evenmoe.planner.bound\n", "planner/bound.py": back})
    assert found["circles"].detail == ["evenmoe.planner.bound, evenmoe.planner.plan"]
    assert found["imports upward"].value == 0


def test_imports_upward_and_sideways_are_found(tmp_path):
    files = {
        "metrics.py": "def late():\n    from evenmoe.planner import plan\n",
        "planner/__init__.py": "",
        "planner/plan.py": "import evenmoe.metrics\n",
        "contract/a.py": "import evenmoe.transport.b\n",
        "transport/b.py": "",
        "attic/c.py": "import evenmoe.metrics\n",
    }
    found = figures_of(tmp_path, files)["imports upward"].detail
    assert found == [
        "evenmoe.attic.c:1 imports evenmoe.metrics, and 'attic' stands on no floor",
        "evenmoe.contract.a:1 imports evenmoe.transport.b",
        "evenmoe.metrics:2 imports evenmoe.planner.plan",
    ]


def test_duplicates_are_found_whatever_stands_between_their_lines(tmp_path):
    indented = 'def f():\n    """Says so."""\n' + "".join(
        f"    {line}\n" for line in SIX.splitlines() if "#" not in line
    )
    found = figures_of(tmp_path, {"a.py": SIX, "b.py": "x = 0\n" + SIX + "y = 0\n", "c.py": indented})
    assert found["duplicate runs of six lines"].value == 2
    assert found["duplicate passages, of one run or more"].detail == [
        "evenmoe/b.py:2 repeats evenmoe/a.py:1, 6 lines",
        "evenmoe/c.py:3 repeats evenmoe/a.py:1, 6 lines",
    ]
    almost = figures_of(tmp_path, {"b.py": SIX.replace("f = ", "g = "), "c.py": ""})
    assert almost["duplicate runs of six lines"].value == 0


def test_words_are_counted_in_code_alone(tmp_path):
    text = '"""Any."""\n# Any\nx: dict[str, Any] = {"Any": given["x"]}\ny: list[Any] = ["occurrence"]\n'
    found = figures_of(tmp_path, {"rules/a.py": text})
    counts = {name: found[name].value for name in ("Any", "dict[str, Any]", 'given["…"]')}
    assert counts == {"Any": 2, "dict[str, Any]": 1, 'given["…"]': 1}
    assert found['files of src that name the rule "occurrence"'].detail == ["evenmoe/rules/a.py"]


@pytest.mark.parametrize(("lines", "code"), [(400, 0), (401, 1)])
def test_a_number_above_its_bound_fails_the_check(tmp_path, lines, code):
    figures_of(tmp_path, {"metrics.py": "x = 1\n" * 3 + "\n" * (lines - 3)})
    call = [sys.executable, house.__file__, "--static", "--check", "--src", tmp_path / "src"]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert ("above" in done.stdout) == (code == 1)


def test_the_real_house_is_measured():
    call = [sys.executable, house.__file__, "--json"]
    found = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert house.BOUNDS.keys() <= found.keys()
    for name in ("ExpertParallel.dispatch, rule rank", "em.dispatch", "evenmoe plan l.pt -o p.json"):
        assert 0 < found[f"{name}: files visited"] < found[f"{name}: functions called"]
    assert found["Placements built by em.plan, batch + previous + windows"] >= 1
    assert found["evenmoe plan l.pt -o p.json: modules of evenmoe imported"] < found["modules"]


def untested(src: Path, tests: Path, page: str) -> list[str]:
    """Modules of 60 lines or more that have neither a test at their path nor a true row in the test map."""
    rows = re.findall(r"^\| (`[a-z0-9_/]+`(?:, `[a-z0-9_/]+`)*) \| (`tests/[^|]+`) \|$", page, re.MULTILINE)
    mapped = {module: re.findall("`([^`]+)`", places) for names, places in rows for module in names[1:-1].split("`, `")}
    found = [f"{module} is no module" for module in mapped if not (src / f"{module}.py").is_file()]
    for module, places in mapped.items():
        found += [f"{module}: {place} is not there" for place in places if not (tests.parent / place).is_file()]
    for path in sorted(src.rglob("[a-z]*.py")):
        module = path.relative_to(src).with_suffix("")
        own = (tests / module.parent / f"test_{module.name}.py").is_file()
        if own and str(module) in mapped:
            found.append(f"{module} has tests of its own")
        elif not own and str(module) not in mapped and path.read_text("utf-8").count("\n") >= 60:
            found.append(f"{module} has no tests at its path")
    return found


def test_what_is_not_tested_is_found(tmp_path):
    src, tests = tmp_path / "src", tmp_path / "tests"
    for folder in (src / "a", tests / "a"):
        folder.mkdir(parents=True)
    for name in ("own", "mapped", "lonely", "both"):
        (src / "a" / f"{name}.py").write_text("\n" * 60)
    (src / "short.py").write_text("\n" * 59)
    for name in ("own", "both"):
        (tests / "a" / f"test_{name}.py").write_text("")
    page = (
        "| `a/mapped`, `a/both` | `tests/a/test_own.py`, `tests/a/test_gone.py` |\n"
        "| `a/away` | `tests/a/test_own.py` |\n"
    )
    assert untested(src, tests, page) == [
        "a/away is no module",
        "a/mapped: tests/a/test_gone.py is not there",
        "a/both: tests/a/test_gone.py is not there",
        "a/both has tests of its own",
        "a/lonely has no tests at its path",
    ]


def test_the_tests_of_a_module_are_found_by_its_path():
    root = house.ROOT
    page = (root / "CONTRIBUTING.md").read_text("utf-8")
    found = untested(root / "src" / "evenmoe", root / "tests", page)
    assert found == [], "give a module tests at its path, or correct its row of the test map in CONTRIBUTING.md"


# Where the field has another word: docs/glossary.md. Words that are also plain English are left to whoever reads.
HOUSE_WORDS = re.compile(
    r"(?<![a-z])(dull|hesitant|hesitate|survivors?|sabotaged?|comovement|clumping|homecoming|twins?|synthesise|triples|picks"
    r"|refusals?|laws|renumbered|crowding|made[ _-]up|told[ _]by|as[ _]loaded|stays?[ _]at[ _]home)(?![a-z])",
    re.IGNORECASE,
)
#: The command's old name, for which its new one is said.
QUOTED = {"tests/cli/test_options.py": "synthesise"}


@pytest.mark.parametrize(
    ("text", "words"), [("def test_dull_rows(): pass", ["dull"]), ("dullness, law", []), ("as loaded", ["as loaded"])]
)
def test_words_of_the_house_are_found(text, words):
    assert [match[0] for match in HOUSE_WORDS.finditer(text)] == words


def test_tests_and_benchmarks_speak_the_fields_words():
    found = []
    for path in sorted(
        path for folder in ("tests", "benchmarks", "tools") for path in (house.ROOT / folder).rglob("*.*")
    ):
        name = str(path.relative_to(house.ROOT))
        if path.suffix not in (".py", ".cpp", ".h") or path == Path(__file__).resolve():
            continue
        for number, line in enumerate([name, *path.read_text("utf-8").splitlines()]):
            words = {match[0] for match in HOUSE_WORDS.finditer(line)} - {QUOTED.get(name)}
            found += [f"{name}:{number}: {word}" for word in sorted(words)]
    assert found == [], "say it in the word that docs/glossary.md has for it"
