"""The command line around the demo: light, and clear about what was wrong."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evenmoe as em
from tests.traces.npz import archive, at, npy_claiming, npz

LOAD = np.arange(1, 25).reshape(2, 3, 4)
SCRIPT = Path(sys.executable).with_name("evenmoe")
STARTS = {
    "script": [str(SCRIPT)],
    "module": [sys.executable, "-m", "evenmoe"],
}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def cpu_seconds(*command: str) -> float:
    """The least of three runs, in which another process disturbs least."""
    least = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return least


@pytest.mark.parametrize(
    ("start", "options"), [("script", ["--help"]), ("module", ["--help"]), ("module", ["demo", "--help"])]
)
def test_help_is_light(start, options):
    """No module of torch, numba or numpy is even looked for."""
    if start == "script" and not SCRIPT.exists():
        pytest.skip("this machine lacks the installed script")
    command = [sys.executable, "-X", "importtime", *(STARTS[start] if start == "script" else ["-m", "evenmoe"])]
    done = run(*command, *options)
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "evenmoe" in imported
    assert "typer" in imported
    assert not imported & {"torch", "numba", "numpy", "scipy", "matplotlib", "llvmlite"}


@pytest.mark.parametrize("start", STARTS)
def test_help_takes_little_time(start):
    """Half a second of CPU, or on a slow machine 40 bare interpreters: 0.3 s and 0.015 s where this was written.

    torch alone takes 1.5 s there, a hundred interpreters.
    """
    if start == "script" and not SCRIPT.exists():
        pytest.skip("this machine lacks the installed script")
    bare = cpu_seconds(sys.executable, "-c", "pass")
    assert cpu_seconds(*STARTS[start], "--help") < max(0.5, 40 * bare)


def test_help_and_version(evenmoe):
    done = evenmoe("--help")
    assert done.code == 0
    assert "demo" in done.out
    done = evenmoe("demo", "--help")
    assert done.code == 0
    for option in ("--trace", "--ranks", "--seed", "--json"):
        assert option in done.out
    assert evenmoe("--version").out == f"{em.__version__}\n"
    assert "Usage" in evenmoe().err  # without anything, the help


MISTAKES = {
    "text": (b"layer,expert,tokens\n0,0,17\n", "is a csv file of no known format"),
    "cut": (npz(load=LOAD)[:200], "is a damaged zip (File is not a zip file)"),
    "without load": (npz(loads=LOAD), "is a npz file of no known format"),
    "a placement": (b'{"0": [0, 1, 0, 1]}', "is a placement (vllm-layer-map): it must be a load or a trace; name"),
    "fractions": (npz(load=LOAD / 2), "is `load` of dtype float64: it must hold integers"),
    "negative": (npz(load=LOAD - 9), "is `load` with counts from -8 to 15: it must hold token counts"),
    "objects": (npz(load=LOAD.astype(object)), "is `load` of dtype object: it must hold integers"),
    "a claim of 2^60 numbers": (
        archive(
            {"load.npy": npy_claiming(f"{{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1, {1 << 60}), }}")}
        ),
        "is `load` of shape (1, 1, 1152921504606846976)",
    ),
    "routing out of range": (
        npz(load=LOAD, routing=np.array([[[0], [1], [4]]])),
        "is `routing` with ids from 0 to 4: it must hold experts, 0 to 3",
    ),
    "a word": (npz(load=np.array(["a"])), "is `load` of dtype <U1: it must hold integers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_that_are_no_traces(evenmoe, tmp_path, mistake):
    data, text = MISTAKES[mistake]
    path = at(tmp_path / "wrong.npz", data)
    done = evenmoe("demo", "--trace", path)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"evenmoe: `{path}` {text}")
    assert done.err.endswith(".\n")
    assert done.err.count("\n") == 1


def test_a_missing_file_from_outside(tmp_path):
    done = run(*STARTS["module"], "demo", "--json", "--trace", str(tmp_path / "none.npz"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"evenmoe: `{tmp_path}/none.npz` is not readable (No such file or directory): it must be an existing file; "
        "check the path.\n"
    )


@pytest.mark.parametrize(
    "options",
    [["demo", "--ranks", "0"], ["demo", "--ranks", "many"], ["demo", "--seed", "-1"], ["demo", "--more"], ["fly"]],
)
def test_calls_that_are_wrong(evenmoe, options):
    done = evenmoe(*options)
    assert done.code == 2
    assert done.out == ""
    assert "Usage: " in done.err
    assert "Traceback" not in done.err
