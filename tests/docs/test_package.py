"""What is published: the same bytes each time, whole metadata, and dependencies that state their licenses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import evenmoe
from tests.patience import HANG_S
from tools.licenses import closure, license_of, main

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("LICENSE", "README.md", "pyproject.toml", ".gitignore")


def build(folder: Path, moment: int = 1_700_000_000) -> dict[str, bytes]:
    """sdist and wheel of a copy of the tree, whose files are as young as the copy."""
    shutil.copytree(
        ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy
    )
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    run = [sys.executable, "-m", "hatchling", "build", "-d", "dist"]
    dated = {**os.environ, "SOURCE_DATE_EPOCH": str(moment)}
    done = subprocess.run(run, cwd=folder, env=dated, timeout=HANG_S, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in (folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, bytes]:
    return build(tmp_path_factory.mktemp("one"))


def test_the_same_tree_gives_the_same_bytes(built, tmp_path):
    assert len(built) == 2
    for name in ("same", "later"):
        (tmp_path / name).mkdir()
    assert build(tmp_path / "same") == built
    later = build(tmp_path / "later", 1_800_000_000)
    assert all(later[name] != content for name, content in built.items())


def test_the_metadata_is_whole(built, tmp_path):
    (name,) = (name for name in built if name.endswith(".whl"))
    (tmp_path / name).write_bytes(built[name])
    with zipfile.ZipFile(tmp_path / name) as wheel:
        files = set(wheel.namelist())
        about = f"evenmoe-{evenmoe.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
    assert {"evenmoe/py.typed", f"{about}/licenses/LICENSE", f"{about}/entry_points.txt"} <= files
    assert metadata["Version"] == evenmoe.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    assert str(metadata.get_payload()) == (ROOT / "README.md").read_text("utf-8")


def test_every_dependency_states_a_license(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert {"numpy", "numba", "torch", "typer", "rich"} <= {line.split()[0] for line in listed.splitlines()}
    assert "states none" not in listed
    assert set(closure("evenmoe")) < set(closure("evenmoe", ["test"]))


def test_a_package_without_a_license_is_found(tmp_path):
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: a\nVersion: 1\n")
    assert license_of(Distribution.at(tmp_path)) is None
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: a\nVersion: 1\nLicense: MIT\n")
    assert license_of(Distribution.at(tmp_path)) == "MIT"
