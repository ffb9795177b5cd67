"""Things by name: added, of a file, of a module, of an installed package."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from evenmoe.errors import ConstraintError
from evenmoe.registry import Registry


def numbers(group: str = "evenmoe.numbers") -> Registry[float]:
    return Registry("number", {"pi": "math:pi", "e": "math:e"}, "builtins:float", "a float", group)


def test_a_file_is_imported_once(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import math\nMINE = math.sqrt(2.0)\n")
    first, second = numbers().get(f"py:{path}:MINE"), numbers().get(f"py:{path}:MINE")
    assert first is second
    assert first == 2.0**0.5


def test_a_file_that_fails_is_tried_anew(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConstraintError) as caught:
        numbers().get(f"py:{path}:MINE")
    assert str(caught.value) == (
        f"`number` is 'py:{path}:MINE': it must be importable, and is not (ZeroDivisionError: division by zero); "
        "mend it."
    )
    path.write_text("MINE = 1.5\n")
    assert numbers().get(f"py:{path}:MINE") == 1.5


def test_entry_points_of_installed_packages(tmp_path, monkeypatch):
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evenmoe.numbers]\ntau = other_numbers:TAU\npi = other_numbers:TAU\n")
    (tmp_path / "other_numbers.py").write_text("TAU = 6.25\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = numbers()
    assert list(found) == ["pi", "e", "tau"]
    assert "other_numbers" not in sys.modules
    assert found.get("tau") == 6.25
    assert found.get("pi") < 4  # a package does not replace what is evenmoe's own
    assert list(numbers("evenmoe.letters")) == ["pi", "e"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "three",
            "`number` is 'three': it must be one of pi, e, or py:module:attribute; choose one of them.",
        ),
        (
            "py:math",
            "`number` is 'py:math': it must be py:module:attribute or py:file.py:attribute; name a module and what "
            "it holds.",
        ),
        (
            "py:math:sin",
            "`number` is py:math:sin, of type builtin_function_or_method: it must be a float; pass one, or its name.",
        ),
        (
            "py:math:none",
            "`number` is 'py:math:none': it must be importable, and is not (AttributeError: module 'math' has no "
            "attribute 'none'); mend it.",
        ),
        (7, "`number` is 7, of type int: it must be a float; pass one, or its name."),
    ],
)
def test_what_is_no_such_thing(name, text):
    with pytest.raises(ConstraintError) as caught:
        numbers().get(name)
    assert str(caught.value) == text


def test_a_name_is_given_once():
    found = numbers()
    found.add("half", 0.5)
    found.add("half", found.get("half"))
    with pytest.raises(ConstraintError) as caught:
        found.add("pi", 3.0)
    assert str(caught.value) == "`name` is 'pi': it must not be taken by another number; choose another."
    with pytest.raises(ConstraintError):
        found.add("seven", 7)


def test_ranks_that_are_threads_import_a_file_once(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(0.2)\nMINE = object()\n")
    things = Registry("thing", {}, "builtins:object", "a thing", "evenmoe.things")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(things.get, [f"py:{path}:MINE"] * 4))
    assert all(thing is found[0] for thing in found)


def test_a_file_that_ends_the_program_does_not(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConstraintError, match=r"must be importable, and is not \(SystemExit: 0\)"):
        numbers().get(f"py:{path}:MINE")


def test_a_relative_path_is_of_the_folder_of_now(tmp_path, monkeypatch):
    found = numbers()
    for value in (1.5, 2.5):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "mine.py").write_text(f"MINE = {value}\n")
        monkeypatch.chdir(folder)
        assert found.get("py:mine.py:MINE") == value
