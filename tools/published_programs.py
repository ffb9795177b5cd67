"""Compile and run public C++ programs that use the operators, and compare with `published.toml`; development only.

    evenmoe cann --out tree
    python tools/published_programs.py --cann tree SOURCE ...

A SOURCE is a folder of such sources, or a repository, of which HEAD is read. Programs are the `.cpp` files of folders
named `examples`, and the complete ones (with a `main`) among the code blocks of `.md` files; those of one text are run
once. Programs that fork are given a rank table of one server, and all of them 16 devices.

The list, tests/ascend/published.toml, names each by repository, path and digest, with what is expected of it;
the programs themselves are others' and stay where they are. `--write-list` prints the entries of what was run.
Exits with 1 where a program does not do what the list expects.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from evenmoe.io.commands import run

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "ascend" / "published.toml"
#: What programs are published with.
LINK_LINES = {
    "opapi": "-lascendcl -lnnopbase -lopapi -lop_common -lpthread -lhccl",
    "opapi_math": "-lascendcl -lnnopbase -lopapi_math -lop_common -lpthread -lhccl",
    "opapi_transformer": "-lopapi_math -lopapi_transformer -lascendcl -lnnopbase -lc_sec -lpthread "
    "-Wl,--no-as-needed -lhccl -lhccl_fwk",
    "cust_opapi": '-L"$ASCEND_OPP_PATH/vendors/custom_transformer/op_api/lib" '
    "-lopapi_math -lcust_opapi -lascendcl -lnnopbase -lc_sec -lpthread "
    "-Wl,--no-as-needed -lhccl -lhccl_fwk",
}
OUTCOMES = ("succeeds", "is refused", "does not compile")
_OPERATOR = re.compile(r"\baclnnMoe(?:Distribute|UpdateExpert|EPLBUpdateExpert)\w*GetWorkspaceSize\s*\(")
_ANOTHER = re.compile(r"\baclnnDistributeBarrier")  # an operator of its own, whose programs use these on the way
_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,})[^\n]*\n(?P<text>.*?)^[ \t]*(?P=fence)[ \t]*$", re.M | re.S)
_OWN_INCLUDE = re.compile(r'^\s*#\s*include\s*"(\.\.?/[^"]+)"', re.MULTILINE)
_TIMEOUT_S = 300.0  # no program takes a tenth of it; the list is of programs that end


@dataclass(frozen=True)
class Program:
    """One program; `block` counts the complete programs of a document from 0, and is None for a source file."""

    path: str
    block: int | None
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def label(self) -> str:
        return self.path if self.block is None else f"{self.path} #{self.block}"


@dataclass(frozen=True)
class Source:
    """Where programs lie: a folder, or the HEAD of a repository."""

    place: Path
    repository: bool

    def names(self) -> list[str]:
        if self.repository:
            listed = self._git("ls-tree", "-r", "-z", "--name-only", "HEAD").decode().split("\0")
            return [name for name in listed if name]
        return sorted(path.relative_to(self.place).as_posix() for path in self.place.rglob("*") if path.is_file())

    def read(self, name: str) -> str | None:
        """The text of a file, None where there is none."""
        if self.repository:
            done = subprocess.run(["git", "-C", self.place, "show", f"HEAD:{name}"], capture_output=True, check=False)
            return done.stdout.decode(errors="replace") if done.returncode == 0 else None
        path = self.place / name
        return path.read_text(errors="replace") if path.is_file() else None

    def commit(self) -> str:
        return self._git("rev-parse", "HEAD").decode().strip() if self.repository else ""

    def _git(self, *arguments: str) -> bytes:
        return subprocess.run(["git", "-C", self.place, *arguments], capture_output=True, check=True).stdout


def source_at(place: Path) -> Source:
    """The source at a path; a folder that is no repository's root is a plain folder."""
    return Source(place, (place / ".git").exists() or (place / "HEAD").is_file())


def programs_in(path: str, text: str) -> Iterator[Program]:
    """The programs of one file that call one of the operators."""
    if path.endswith(".md"):
        blocks = [_dedented(match["text"], match["indent"]) for match in _FENCE.finditer(text)]
        complete = [block for block in blocks if re.search(r"\bmain\s*\(", block)]
        found = [Program(path, number, block) for number, block in enumerate(complete)]
    else:
        found = [Program(path, None, text)]
    return (one for one in found if _OPERATOR.search(one.text) and not _ANOTHER.search(one.text))


def _dedented(text: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))


def programs_of(source: Source) -> list[Program]:
    """All programs of a source, each text once, by path."""
    found: dict[str, Program] = {}
    for name in source.names():
        example = name.endswith(".cpp") and ("examples" in PurePosixPath(name).parts or not source.repository)
        if example or name.endswith(".md"):
            for program in programs_in(name, source.read(name) or ""):
                found.setdefault(program.sha256, program)
    return list(found.values())


@dataclass(frozen=True)
class Result:
    """What a program did; `text` is its first error, or its last line."""

    outcome: str
    text: str


def outcome_of(program: Program, source: Source, tree: Path, link: str) -> Result:
    """Compile a program as its documents say, and run it after the tree's setenv.bash."""
    with tempfile.TemporaryDirectory() as folder:
        cpp = Path(folder) / (program.path if program.block is None else f"{program.path}.cpp")
        cpp.parent.mkdir(parents=True, exist_ok=True)
        cpp.write_text(program.text)
        # A checkout has the headers that a program includes by their place beside it.
        for include in _OWN_INCLUDE.findall(program.text):
            name = os.path.normpath(PurePosixPath(program.path).parent / include)
            header = source.read(name)
            if header is not None:
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_text(header)
        folders = f'-I"{tree}/include" -I"{tree}/include/aclnn" -I"{tree}/include/aclnnop" -L="{tree}/lib64"'
        compiled = _bash(tree, f'g++ "{cpp}" -o program {folders} {link}', folder)
        if compiled.returncode:
            errors = [line for line in compiled.stderr.splitlines() if "error" in line or "cannot find" in line]
            return Result("does not compile", (errors or ["the compiler failed"])[0].replace(f"{folder}/", ""))
        return _judged(_bash(tree, "./program", folder, ENV_DEV_NUM="16", **_rank_table(program, Path(folder))))


def _rank_table(program: Program, folder: Path) -> dict[str, str]:
    """The variables of a program whose ranks are processes; others take them for a wish to run on Atlas A2."""
    if not re.search(r"\bfork\s*\(", program.text) or "RANK_TABLE_FILE" not in program.text:
        return {}
    count = re.search(r"\bprocessCount\s*=\s*(\d+)", program.text)
    ranks = [str(rank) for rank in range(int(count[1]) if count else 2)]
    devices = [{"device_id": rank, "device_ip": f"10.1.0.{rank}", "rank_id": rank} for rank in ranks]
    table = {"version": "1.0", "status": "completed", "server_count": "1"}
    path = folder / "rank_table.json"
    path.write_text(json.dumps({**table, "server_list": [{"server_id": "10.0.0.1", "device": devices}]}))
    return {"RANK_TABLE_FILE": str(path), "FIRST_RANK_ID": "0"}


def _judged(done: subprocess.CompletedProcess[str]) -> Result:
    """Examples end with 0 whatever happens, and print what failed; they end early, in silence, without devices."""
    lines = [line.strip() for line in done.stdout.splitlines()]
    failed = [line for line in lines if re.search(r"\berror\b|\bfail(ed|ure)?\b", line, re.IGNORECASE)]
    succeeded = [line for line in lines if re.search(r"\bsuccess(fully)?\b", line) and "aclFinalize" not in line]
    if done.returncode or failed or not succeeded:
        ends = "did not end" if done.returncode == -signal.SIGKILL else f"exit code {done.returncode}"
        return Result("is refused", (failed or [f"{ends}, {(lines or ['no output'])[-1]}"])[0])
    return Result("succeeds", f"{len(succeeded)} lines of success")


def _bash(tree: Path, command: str, folder: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f'source "{tree}/bin/setenv.bash" && {command}'
    environment = {"PATH": os.environ["PATH"], **environment}
    return run(["bash", "-c", script], timeout_s=_TIMEOUT_S, cwd=folder, env=environment)


def expected_outcomes(path: Path = LIST) -> dict[str, dict[str, str]]:
    """{sha256: entry} of the list."""
    import tomllib  # of Python 3.11

    return {entry["sha256"]: entry for entry in tomllib.loads(path.read_text())["program"]}


def entry_text(program: Program, repository: str, commit: str, result: Result) -> str:
    """One entry of the list."""
    block = "" if program.block is None else f"block = {program.block}\n"
    return (
        f'[[program]]\nrepository = "{repository}"\ncommit = "{commit}"\npath = "{program.path}"\n{block}'
        f'sha256 = "{program.sha256}"\noutcome = "{result.outcome}"\n'
    )


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run everything, and print one line for each program and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="a folder of sources, or a repository")
    parser.add_argument("--cann", type=Path, required=True, help="what `evenmoe cann --out` was given")
    parser.add_argument("--link", choices=LINK_LINES, default="opapi", help="which of the published link lines")
    parser.add_argument("--list", type=Path, default=LIST, help="what is expected (default: the project's list)")
    parser.add_argument("--only", default="", help="only programs whose path has this text")
    parser.add_argument("--write-list", metavar="OWNER/NAME", help="print entries of the list, for one repository")
    given = parser.parse_args(arguments)
    tree = given.cann.resolve() / "latest"
    if not (tree / "bin" / "setenv.bash").is_file() or shutil.which("g++") is None:
        parser.error(f"{given.cann} must be a tree of `evenmoe cann`, and g++ on PATH")
    expected = expected_outcomes(given.list) if given.list.is_file() else {}
    seen: set[str] = set()
    sums = dict.fromkeys(("compiled", "succeeded", "as expected", "programs"), 0)
    for place in given.sources:
        source = source_at(place)
        for program in programs_of(source):
            if given.only not in program.path or program.sha256 in seen:
                continue
            seen.add(program.sha256)
            result = outcome_of(program, source, tree, LINK_LINES[given.link])
            entry = expected.get(program.sha256)
            wanted = entry["outcome"] if entry else "not in the list"
            sums["programs"] += 1
            sums["compiled"] += result.outcome != "does not compile"
            sums["succeeded"] += result.outcome == "succeeds"
            sums["as expected"] += result.outcome == wanted
            if given.write_list:
                say(entry_text(program, given.write_list, source.commit(), result))
            else:
                say(f"{result.outcome:16}  expected: {wanted:16}  {program.label}: {result.text}")
    if not given.write_list:
        say(", ".join(f"{number} {name}" for name, number in sums.items()))
    return 0 if sums["as expected"] == sums["programs"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
