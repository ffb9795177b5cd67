"""Compiled kernels run whatever the file system says, and are compiled once wherever it lets them be kept."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evenmoe as em

SOURCE = Path(em.__file__).parent

USE = """
import numpy as np, torch
import evenmoe as em
load = np.array([[70, 10, 10, 10]])
placement = em.plan(load, num_ranks=2, num_slots=6)
print(float(em.peak_to_average(load, placement)[0]), float(em.lower_bound(load, num_ranks=2, num_slots=6)[0]))
with em.local_world(1) as world:
    def layer(rank):
        got = em.dispatch(torch.ones(2, 8).bfloat16(), torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), ep=rank.ep,
                          num_experts=2, limits="unlimited")
        return em.combine(got.expand_x, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), got,
                          torch.full((2, 2), 0.5), ep=rank.ep, num_experts=2, limits="unlimited")
    print(world.run(layer)[0].float().sum().item())
"""

KERNEL = """
from evenmoe.compiled import compiled

@compiled
def double(x):
    return 2 * x

print(double(21), sum(double.stats.cache_hits.values()))
"""

CALLER = """
from evenmoe.compiled import compiled
from other import double

@compiled
def call(x):
    return double(x)

print(call(21), sum(call.stats.cache_hits.values()))
"""


def python(folder: Path, code: str | Path, *, most_bytes: int | None = None) -> str:
    """What a program prints that finds evenmoe in `folder` and has no home."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    environment = {
        "HOME": "/dev/null",  # where not even root can make a folder
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        # Python installs bytecode that a limit has cut, and every later process would stumble over it.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else [str(code)])]
    done = subprocess.run(
        command, env=environment, preexec_fn=limit, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder with a copy of the package, into which no cache can be written, not even by root."""
    shutil.copytree(SOURCE, tmp_path / "lib" / "evenmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, _ in os.walk(tmp_path / "lib"):
        Path(folder, "__pycache__").touch()
    return tmp_path / "lib"


@pytest.fixture
def kernel(tmp_path) -> Path:
    """A program with a kernel of its own, beside which the cache can be."""
    path = tmp_path / "program" / "kernel.py"
    path.parent.mkdir()
    path.write_text(KERNEL)
    return path


def test_without_any_place_for_a_cache(installed):
    """By hand: 70 tokens on 2 ranks with 3 slots each; shared by both ranks, every rank has 35 + 15 = 50 at best."""
    plan, chain = python(installed, USE).splitlines()
    assert plan == "1.0 1.0"
    assert chain == "16.0"  # 2 tokens of 8 ones, each the mean of two copies of itself
    assert not list(installed.rglob("*.nb?"))


def test_a_second_process_finds_what_the_first_compiled(kernel):
    assert python(SOURCE.parent, kernel) == "42 0\n"
    assert python(SOURCE.parent, kernel) == "42 1\n"


def test_a_kernel_that_is_imported_may_change(kernel):
    """By hand: 2 · 21, and 3 · 21 once the imported kernel multiplies by 3; the caller's own file is the same."""
    shutil.copy(kernel, kernel.with_name("other.py"))
    kernel.write_text(CALLER)
    assert python(SOURCE.parent, kernel) == "42 0\n42 0\n"
    assert python(SOURCE.parent, kernel) == "42 1\n42 1\n"
    other = kernel.with_name("other.py")
    other.write_text(KERNEL.replace("2 * x", "3 * x"))
    assert python(SOURCE.parent, kernel) == "63 0\n63 0\n"
    assert python(SOURCE.parent, kernel) == "63 1\n63 1\n"


@pytest.mark.parametrize("most_bytes", [0, 1, 300, 2000])
def test_a_disk_that_is_full(kernel, most_bytes):
    """Compiled code has 5 kB, its index 200 bytes: neither fits, the first bytes do, or the index alone."""
    assert python(SOURCE.parent, kernel, most_bytes=most_bytes) == "42 0\n"
    assert not list(kernel.parent.rglob("*.tmp.*"))
    assert python(SOURCE.parent, kernel) == "42 0\n"
    assert python(SOURCE.parent, kernel) == "42 1\n"


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"no pickle at all"], ids=["empty", "cut", "other"])
def test_a_damaged_cache(kernel, suffix, damage):
    python(SOURCE.parent, kernel)
    (path,) = kernel.parent.rglob(f"*.{suffix}")
    path.write_bytes(damage)
    assert python(SOURCE.parent, kernel) == "42 0\n"
    assert python(SOURCE.parent, kernel) == "42 1\n"


def test_every_kernel_goes_this_way():
    for path in SOURCE.rglob("*.py"):
        if path.name != "compiled.py":
            assert "njit" not in path.read_text(encoding="utf-8"), path
