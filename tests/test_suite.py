"""The suite itself: no test of it reads the clock, and none is skipped but for what the machine lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings


@pytest.mark.parametrize("profile", ["repeatable", "clockless"])
def test_hypothesis_never_judges_by_the_clock(profile):
    chosen = settings.get_profile(profile)
    assert chosen.deadline is None
    assert HealthCheck.too_slow in chosen.suppress_health_check
    assert chosen.derandomize == (profile == "repeatable")


SKIPS = """
import pytest

def test_a_machine_that_lacks_something():
    pytest.skip("this machine lacks a compiler")

def test_a_file_that_is_absent():
    pytest.skip("the data is not beside the repository")

@pytest.mark.parametrize("name", [])
def test_nothing_to_try(name):
    pass

@pytest.mark.xfail
def test_a_known_failure():
    assert False
"""


def test_only_what_the_machine_lacks_may_be_skipped(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_makereport\n")
    (tmp_path / "test_skips.py").write_text(SKIPS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1].startswith("1 failed, 1 skipped, 1 xfailed, 1 error"), done.stdout
    for name in ("test_a_file_that_is_absent", "test_nothing_to_try"):
        assert f"::{name}" in done.stdout


ROOT = Path(__file__).resolve().parents[1]


def test_the_lowest_versions_tried_are_those_declared():
    """`make floors` tries what pyproject.toml promises, not what somebody once wrote beside it."""
    block = re.search(r"\ndependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert block is not None
    declared = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', block[1].lower()))
    assert len(declared) == block[1].count("\n") + 1, "every dependency has a lowest version, and no other condition"
    lines = (ROOT / "constraints-lowest.txt").read_text().lower().splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line)
    for name, version in declared.items():
        assert f"{tried[name]}.0.0".split(".")[:3] == f"{version}.0.0".split(".")[:3], name
