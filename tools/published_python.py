"""Run public Python programs for the chip under `patch(npu=True)`, and compare with a list; development only.

    python tools/published_python.py REPOSITORY [--name OWNER/NAME] [--only TEXT]

REPOSITORY is a clone of one that tests/ascend/published_python.toml names, with the commits of the list. A program is
a file, or one of the Python blocks of a `.md` file that has an `import`; the list says which by its digest, and what is
expected. Those that wait for ever for ranks that have raised (`hangs`) are ended after five minutes. The programs
themselves are others' and stay where they are. With a folder in place of a repository, every `.py` file in it that
imports torch_npu is run. Programs use fixed ports, so that one runs at a time.
Exits with 1 where a program does not do what the list expects.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

from evenmoe.io.commands import run

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "ascend" / "published_python.toml"
_FENCE = re.compile(r"^[ \t>]*```[ \t]*python[ \t]*\n(.*?)^[ \t>]*```", re.MULTILINE | re.DOTALL)
_HANGS_S = 300.0  # in which ranks raise that a program waits for ever for: 200 on two busy cores
_TIMEOUT_S = 1800.0  # examples take a minute; tests that spawn 64 processes took 13 on two busy cores


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        patch: what `patch` is called with.
        outcome: what is expected, "" where nothing is.
        hangs: it waits for ever for ranks that have raised.
    """

    name: str
    text: str
    patch: str
    outcome: str
    hangs: bool = False


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page that import something, without their indent."""
    return [textwrap.dedent(block) for block in _FENCE.findall(page) if "import" in block]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def listed(repository: Path, entries: list[dict]) -> Iterator[Program]:
    """The programs of the list, from the commits that it names.

    Raises:
        ValueError: the text is another one than that of the list.
    """
    for entry in entries:
        where = f"{entry['commit']}:{entry['path']}"
        shown = subprocess.run(["git", "-C", repository, "show", where], capture_output=True, text=True, check=False)
        if shown.returncode:
            raise ValueError(f"{repository} has no {where}; fetch all branches of {entry['repository']}")
        block = entry.get("block")
        text = shown.stdout if block is None else blocks_of(shown.stdout)[block]
        name = entry["path"] if block is None else f"{entry['path']} #{block}"
        if digest(text) != entry["sha256"]:
            raise ValueError(f"{name} at {entry['commit']} has another digest than the list says")
        hangs = entry.get("hangs", False)
        yield Program(f"{entry['branch']} {name}", text, entry["patch"], entry["outcome"], hangs)


def in_folder(folder: Path) -> Iterator[Program]:
    """Every program of a folder that imports torch_npu."""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(errors="replace")
        if re.search(r"^\s*(?:import|from) .*\btorch_npu\b", text, re.MULTILINE):
            yield Program(path.relative_to(folder).as_posix(), text, "npu=True", "")


def outcome_of(program: Program) -> tuple[str, str]:
    """("succeeds" or "fails", how): its last line, or the first error of any of its processes."""
    limit_s = _HANGS_S if program.hangs else _TIMEOUT_S
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(f"import evenmoe.ascend; evenmoe.ascend.patch({program.patch})\n{program.text}")
        done = run(
            [sys.executable, script],
            timeout_s=limit_s,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    output = done.stdout
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*Error\b", line)]
    if done.returncode or errors or "Traceback" in output:
        killed = done.returncode == -signal.SIGKILL
        ended = f"did not end within {limit_s:g} s" if killed else f"exit code {done.returncode}"
        return "fails", (errors or [ended])[0][:200]
    finished = sum("npu finished" in line for line in lines)
    return "succeeds", f"{finished} ranks finished" if finished else (lines or ["no output"])[-1][:200]


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run everything, and print one line for each program and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a clone of the repository, or a folder")
    parser.add_argument("--name", default="Ascend/op-plugin", help="whose clone it is (default: %(default)s)")
    parser.add_argument("--list", type=Path, default=LIST, help="what is expected (default: the project's list)")
    parser.add_argument("--only", default="", help="only programs whose branch and path have this text")
    given = parser.parse_args(arguments)
    repository = (given.source / ".git").exists() or (given.source / "HEAD").is_file()
    entries = tomllib.loads(given.list.read_text())["program"] if repository else []
    entries = [entry for entry in entries if entry["repository"] == given.name]
    programs = listed(given.source, entries) if repository else in_folder(given.source)
    sums = {"programs": 0, "succeeded": 0, "as expected": 0}
    for program in programs:
        if given.only not in program.name:
            continue
        outcome, how = outcome_of(program)
        sums["programs"] += 1
        sums["succeeded"] += outcome == "succeeds"
        sums["as expected"] += outcome == (program.outcome or "succeeds")
        expected = f"  expected: {program.outcome:8}" if program.outcome else ""
        say(f"{outcome:8}{expected}  {program.name}: {how}")
    say(", ".join(f"{number} {name}" for name, number in sums.items()))
    return 0 if sums["as expected"] == sums["programs"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
