"""`tools/house.py` counts what it says: it finds what is planted in a small house, and measures the real one."""

from __future__ import annotations

import json
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
