"""The list of public Python programs is well formed, and the tool that runs it judges a program by what it does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools import published_python as tool

ENTRIES = tool.tomllib.loads(tool.LIST.read_text())["program"]


def test_every_program_is_listed_once_and_whole():
    digests = [entry["sha256"] for entry in ENTRIES]
    assert len(set(digests)) == len(digests)
    for entry in ENTRIES:
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
        assert re.fullmatch(r"[0-9a-f]{40}", entry["commit"])
        assert ("block" in entry) == entry["path"].endswith(".md")
        assert entry["outcome"] == ("fails" if "reason" in entry else "succeeds")
        assert entry.get("hangs", False) <= (entry["outcome"] == "fails")
        assert entry["patch"] in ("npu=True", "npu=True, check_values=False")


@pytest.fixture
def said(tmp_path):
    lines: list[str] = []

    def run(*arguments: object) -> int:
        return tool.main([str(argument) for argument in arguments], lines.append)

    run.lines = lines
    return run


def test_a_folder_of_programs(tmp_path, said):
    (tmp_path / "right.py").write_text("import torch, torch_npu\nprint(torch.ones(2, device='npu').sum().item())\n")
    (tmp_path / "wrong.py").write_text("import torch_npu\ntorch_npu.npu_swiglu()\n")
    (tmp_path / "other.py").write_text("print(1)\n")
    assert said(tmp_path) == 1
    right, wrong, sums = said.lines
    assert right == "succeeds  right.py: 2.0"
    assert wrong.startswith(
        "fails     wrong.py: evenmoe.ascend.patching.NotEmulatedError: `torch_npu.npu_swiglu` is not "
    )
    assert sums == "2 programs, 1 succeeded, 1 as expected"


def test_a_program_that_waits_for_ever(monkeypatch):
    monkeypatch.setattr(tool, "_HANGS_S", 0.0)
    program = tool.Program("a", "import time\ntime.sleep(1000)\n", "npu=True", "fails", hangs=True)
    assert tool.outcome_of(program) == ("fails", "did not end within 0 s")


def _git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_programs_of_a_list(tmp_path, said):
    repository = tmp_path / "repository"
    repository.mkdir()
    page = "- so\n\n  ```python\n  import torch_npu\n  print('rank 0 npu finished')\n  ```\n\n```python\nx = 1\n```\n"
    (repository / "page.md").write_text(page)
    _git(repository, "init", "-q")
    _git(repository, "add", ".")
    _git(repository, "commit", "-qm", "a")
    (block,) = tool.blocks_of(page)
    assert block == "import torch_npu\nprint('rank 0 npu finished')\n"
    entries = tmp_path / "list.toml"
    commit = _git(repository, "rev-parse", "HEAD").strip()
    entry = (
        f'[[program]]\nrepository = "a/b"\nbranch = "1.0"\ncommit = "{commit}"\npath = "page.md"\nblock = 0\n'
        f'sha256 = "{tool.digest(block)}"\npatch = "npu=True"\noutcome = "succeeds"\n'
    )
    entries.write_text(entry)
    assert said(repository, "--name", "a/b", "--list", entries) == 0
    assert said.lines == [
        "succeeds  expected: succeeds  1.0 page.md #0: 1 ranks finished",
        "1 programs, 1 succeeded, 1 as expected",
    ]
    assert said(repository, "--name", "a/b", "--list", entries, "--only", "other") == 0
    assert said(repository, "--name", "another/one", "--list", entries) == 0
    assert said.lines[-1] == "0 programs, 0 succeeded, 0 as expected"
    entries.write_text(entry.replace(tool.digest(block), "0" * 64))
    with pytest.raises(ValueError, match="another digest than the list says"):
        said(repository, "--name", "a/b", "--list", entries)
    entries.write_text(entry.replace(commit, "0" * 40))
    with pytest.raises(ValueError, match="fetch all branches of a/b"):
        said(repository, "--name", "a/b", "--list", entries)
