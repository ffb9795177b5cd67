"""The tree of headers and libraries, written once, and C++ programs compiled and run against it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from evenmoe.ascend.cann.build import build_tree
from tests.patience import HANG_S

PROGRAMS = Path(__file__).parent / "programs"
LIBRARIES = ["-lascendcl", "-lnnopbase", "-lopapi", "-lop_common", "-lhccl", "-lpthread"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def run_in_tree(tree: Path, command: str, directory: Path, timeout: float = HANG_S) -> subprocess.CompletedProcess[str]:
    """Run a bash command after the tree's setenv.bash, with no other variable than PATH."""
    script = f'source "{tree}/bin/setenv.bash" && {command}'
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree as `evenmoe cann` writes it."""
    if shutil.which("g++") is None:
        pytest.skip("this machine lacks g++")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this machine lacks a Python built with a shared library, which a C++ program embeds")
    return build_tree(tmp_path_factory.mktemp("cann_env"))


@pytest.fixture(scope="session")
def run_program(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(name, *arguments) -> the finished run of programs/name.cpp; warnings of its compilation are errors."""
    directory = tmp_path_factory.mktemp("programs")

    def run(name: str, *arguments: str, timeout: float = HANG_S) -> subprocess.CompletedProcess[str]:
        if not (directory / name).exists():
            compiler = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", str(PROGRAMS / f"{name}.cpp")]
            paths = [f"-I{tree / 'include'}", f"-L{tree / 'lib64'}"]
            subprocess.run([*compiler, "-o", str(directory / name), *paths, *LIBRARIES], check=True)
        return run_in_tree(tree, f"./{name} {' '.join(arguments)}", directory, timeout)

    return run


def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[int, str]]:
    """{label: (status, message)} of a program that prints them, after a clean exit."""
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2]
    return {label: (int(status), message) for label, status, message in rows}
