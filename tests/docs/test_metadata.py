"""What others read about the project agrees with the project."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import yaml

import evenmoe

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_names_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert citation["version"] == evenmoe.__version__
    assert 'dynamic = ["version"]' in project
    assert f'license = "{citation["license"]}"' in project
    assert citation["keywords"] == re.findall(r'"([^"]+)"', project.partition("keywords = [")[2].partition("]")[0])


def test_types_are_published():
    assert files(evenmoe).joinpath("py.typed").is_file()


def test_hooks_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [(repo["repo"], hook["language"]) for repo in hooks for hook in repo["hooks"]] == [("local", "system")] * 3


def test_pages_link_to_files_that_are_there():
    broken = [
        f"{page.name}: {target}"
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
