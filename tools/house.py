"""How large and how tangled the house is, in numbers: `python tools/house.py [--old SRC] [--check]`.

It reads the source and runs a few calls of the public API under `sys.setprofile`. `--old SRC` adds a column for another
`src` folder, such as that of an earlier commit; `--check` exits with 1 where a number is above its bound.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "evenmoe"

#: What `--check` holds a number to: the aims of the second edition, below or at which it stays.
BOUNDS = {
    "modules": 160,
    "lines": 24_500,
    "modules over 400 lines": 0,
    "ExpertParallel.dispatch, rule rank: functions called": 45,
    "ExpertParallel.dispatch, rule rank: files visited": 6,
    "em.dispatch: functions called": 120,
    "em.dispatch: files visited": 10,
    "evenmoe plan l.pt -o p.json: files visited": 25,
    "Placements built by em.plan, batch + previous + windows": 1,
    "duplicate runs of six lines": 12,
    'given["…"]': 0,
    "Any": 40,
    "dict[str, Any]": 40,
    "imports upward": 0,
    "circles": 0,
}

#: From the top: a package imports from floors below it only, and nothing beside it on its own floor but itself.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("integrations", "live"),
    ("advice", "ascend", "report"),
    ("simulator",),
    ("engines",),
    ("planner", "layer", "runtime"),
    ("ops", "exchange"),
    ("formats",),
    ("rules", "traces"),
    ("transport",),
    ("contract",),
    ("io",),
    ("registry",),
    ("reference",),
    ("costs", "dispatched", "evidence"),
    ("metrics", "quantities"),
    ("placement",),
    ("slot_arrays",),
    ("errors",),
    ("compiled", ""),  # "" is evenmoe itself, whose names are imported when first used
)

RUN = 6  # lines that make a duplicate


@dataclass
class Figure:
    """One number, and what it is made of."""

    name: str
    value: int
    detail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Import:
    """One module naming another; `typing` where only a type checker follows it."""

    module: str
    imported: str
    line: int
    typing: bool


# What the source says


def modules_of(src: Path) -> dict[str, Path]:
    """{module: file} of the package."""
    found = {}
    for path in sorted((src / PACKAGE).rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package_of(module: str) -> str:
    """What stands on a floor: the first name below the root."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(modules: dict[str, Path]) -> list[Import]:
    """Every import of a module of the package by another, those inside functions too."""
    found = []
    for module, path in modules.items():
        tree = ast.parse(path.read_text("utf-8"))
        guarded = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        typing = {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in names]
            else:
                continue
            found += [
                Import(module, name, node.lineno, node in typing)
                for name in dict.fromkeys(names)
                if name in modules and name != module
            ]
    return found


def imports_upward(imports: list[Import]) -> list[str]:
    """Imports of a package from its own floor or one above; the root may name all, since it imports them lazily."""
    height = {name: -number for number, floor in enumerate(FLOORS) for name in floor}
    found = []
    for one in imports:
        low, high = package_of(one.module), package_of(one.imported)
        if low == "" or high == low:
            continue
        unknown = [name for name in (low, high) if name not in height]
        if unknown:
            found.append(f"{one.module}:{one.line} imports {one.imported}, and {unknown[0]!r} stands on no floor")
        elif height[high] >= height[low]:
            found.append(f"{one.module}:{one.line} imports {one.imported}")
    return found


def circles(imports: list[Import]) -> list[str]:
    """Modules that import each other in a circle, for types too; the root's lazy names are no imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in imports:
        if one.module != PACKAGE:
            graph[one.module].add(one.imported)
    found: dict[frozenset[str], None] = {}
    for start in graph:
        reached = _reached(graph, start)
        if start in reached:
            found[frozenset(other for other in reached if start in _reached(graph, other))] = None
    return [", ".join(sorted(circle)) for circle in found]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph.get(module, ())
    return reached


def code_lines(text: str) -> list[tuple[int, str]]:
    """(line number, stripped line) of what is neither blank, an import, a docstring nor a comment alone."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                left_out.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in left_out)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def duplicate_runs(files: dict[str, str]) -> tuple[int, list[str]]:
    """How many runs of six lines stand a second time, and, overlapping ones as one, where they stood first."""
    first: dict[tuple[str, ...], tuple[str, int]] = {}
    total, found = 0, []
    for name, text in files.items():
        lines = code_lines(text)
        begin, source, size = 0, ("", 0), 0  # of the repetition that the last run was part of
        for index in range(len(lines) - RUN + 2):
            run = tuple(line for _, line in lines[index : index + RUN])
            here = (name, lines[index][0])
            earlier = first.setdefault(run, here) if len(run) == RUN else here
            if earlier != here:
                begin, source = (begin, source) if size else (here[1], earlier)
                size, total = size + 1, total + 1
            elif size:
                found.append(f"{name}:{begin} repeats {source[0]}:{source[1]}, {size + RUN - 1} lines")
                size = 0
    return total, found


def words(text: str) -> Iterator[str]:
    """The tokens of the code, without comments and strings."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP):
            yield token.string


def count_sequence(text: str, *sequence: str) -> int:
    """How often these tokens follow each other."""
    tokens = list(words(text))
    size = len(sequence)
    return sum(tuple(tokens[start : start + size]) == sequence for start in range(len(tokens) - size + 1))


def source_figures(src: Path) -> list[Figure]:
    """What can be read without running anything."""
    modules = modules_of(src)
    texts = {str(path.relative_to(src)): path.read_text("utf-8") for path in modules.values()}
    lines = {name: text.count("\n") for name, text in texts.items()}
    imports = imports_of(modules)
    upward, around = imports_upward(imports), circles(imports)
    repeated, repetitions = duplicate_runs(texts)
    tests = src.parent / "tests"
    beside = {str(path.relative_to(src.parent)): path.read_text("utf-8") for path in sorted(tests.rglob("*.py"))}
    quoted = re.compile("[\"']occurrence[\"']")
    in_src = [name for name, text in texts.items() if quoted.search(text)]
    in_tests = [name for name, text in beside.items() if quoted.search(text)]

    def total(name: str, count: Callable[[str], int]) -> Figure:
        by_file = Counter({file: count(text) for file, text in texts.items()})
        detail = [f"{file}: {number}" for file, number in by_file.most_common() if number]
        return Figure(name, by_file.total(), detail)

    return [
        Figure("modules", len(modules)),
        Figure("lines", sum(lines.values())),
        _by_size("modules over 400 lines", lines, lambda size: size > 400),
        _by_size("modules under 60 lines", lines, lambda size: size < 60),
        _by_size("modules under 40 lines", lines, lambda size: size < 40),
        Figure('files of src that name the rule "occurrence"', len(in_src), in_src),
        Figure('files of tests that name the rule "occurrence"', len(in_tests), in_tests),
        Figure("duplicate runs of six lines", repeated, repetitions),
        Figure("duplicate passages, of one run or more", len(repetitions), repetitions),
        total('given["…"]', lambda text: text.count('given["')),
        total("Any", lambda text: count_sequence(text, "Any")),
        total("dict[str, Any]", lambda text: count_sequence(text, "dict", "[", "str", ",", "Any", "]")),
        Figure("imports upward", len(upward), upward),
        Figure("circles", len(around), around),
    ]


def _by_size(name: str, lines: dict[str, int], chosen: Callable[[int], bool]) -> Figure:
    files = sorted((size, file) for file, size in lines.items() if chosen(size))
    return Figure(name, len(files), [f"{file}: {size}" for size, file in files])


# What runs


class Visits:
    """The functions of evenmoe that are called while it is the profiler of a thread, by file."""

    def __init__(self) -> None:
        self.calls: list[CodeType] = []
        self._folder = os.sep + PACKAGE + os.sep

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # A module's body and a class's are no functions: they have no fast locals.
        if event == "call" and code.co_flags & 1 and self._folder in code.co_filename:
            self.calls.append(code)

    def figures(self, name: str) -> list[Figure]:
        by_file = Counter(code.co_filename.split(self._folder)[-1] for code in self.calls)
        detail = [f"{file}: {number}" for file, number in by_file.most_common()]
        return [
            Figure(f"{name}: functions called", len(self.calls), detail),
            Figure(f"{name}: files visited", len(by_file), detail),
        ]


def _visited(call: Callable[[], Any]) -> tuple[Any, Visits]:
    visits = Visits()
    sys.setprofile(visits)
    try:
        return call(), visits
    finally:
        sys.setprofile(None)


def dispatch_figures() -> list[Figure]:
    """A dispatch of one rank of two, after whatever is prepared once per shape.

    Of ten calls the one with fewest: a rank that waits for the other does a little more.
    """
    import torch

    import evenmoe as em

    placement = em.Placement([[0, 1, 2, 3, 0, 1]], num_ranks=2)
    x, weights = torch.ones(4, 8), torch.full((4, 2), 0.5)
    logical = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    slots = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 5]], dtype=torch.int32)

    def step(rank: Any) -> list[Figure]:
        layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=6, rule="rank")
        calls = {
            "ExpertParallel.dispatch, rule rank": lambda: layer.dispatch(x, logical, weights),
            "em.dispatch": lambda: em.dispatch(x, slots, ep=rank.ep, num_experts=6),
        }
        found = []
        for name, call in calls.items():
            call()
            visits = min((_visited(call)[1] for _ in range(10)), key=lambda visits: len(visits.calls))
            found += visits.figures(name)
        return found

    with em.local_world(ep_size=2) as world:
        return world.run(step)[0]


def placement_figure() -> list[Figure]:
    """Placements that come into being while one plan is made."""
    import evenmoe as em

    load = [[[300 + 7 * e * (t + 1) % 90 for e in range(8)], [100 + 9 * e for e in range(8)]] for t in range(2)]
    before = em.plan(load[0], num_ranks=2, num_slots=10)
    made = em.Placement.__init__.__code__

    def plan() -> em.Placement:
        return em.plan(load, num_ranks=2, num_slots=10, previous=before, rule="batch")

    plan()  # compiles: the compiler's own calls under the profiler would take minutes
    visits = _visited(plan)[1]
    count = sum(code is made for code in visits.calls)
    return [Figure("Placements built by em.plan, batch + previous + windows", count)]


def _run_command() -> str | int | None:
    try:
        from evenmoe.cli import main

        main()
    except SystemExit as done:
        return done.code
    return 0


def command_figures() -> list[Figure]:
    """`evenmoe plan` of a recorder's file, in this process; what is imported for it counts where it is called."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torch.save({"logical_count": 100 + torch.arange(3 * 2 * 16).reshape(3, 2, 16) % 37}, "l.pt")
        call = ["plan", "l.pt", "-o", "p.json", "--ranks", "4", "--slots", "20", "--first-layer", "0"]
        # Once without the profiler, which would watch the compiler too, for minutes.
        subprocess.run([sys.executable, "-m", PACKAGE, *call], stdout=subprocess.DEVNULL, check=True)
        sys.argv = [PACKAGE, *call]
        with redirect_stdout(io.StringIO()):
            code, visits = _visited(_run_command)
        os.chdir(ROOT)
    if code:
        raise SystemExit(f"`{' '.join(sys.argv)}` ended with {code}")
    imported = sorted(name for name in sys.modules if name.partition(".")[0] == PACKAGE)
    name = "evenmoe plan l.pt -o p.json"
    return [*visits.figures(name), Figure(f"{name}: modules of evenmoe imported", len(imported), imported)]


MEASURES = {"dispatch": dispatch_figures, "placement": placement_figure, "command": command_figures}


def running_figures(src: Path) -> list[Figure]:
    """Every measure in a process of its own, so that none finds imported what another needed."""
    found = []
    for name in MEASURES:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name],
            env={**os.environ, "PYTHONPATH": str(src)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found += [Figure(**figure) for figure in json.loads(done.stdout)]
    return found


# What is printed


def table(columns: list[list[Figure]]) -> str:
    """One row a number, with its bound and the other source's number beside it."""
    others = {figure.name: figure.value for figure in columns[-1]}
    width = max(len(figure.name) for figure in columns[0])
    head = f"{'':{width}}  {'now':>7}" + (f"  {'old':>7}" if len(columns) > 1 else "") + f"  {'bound':>7}"
    rows = [head]
    for figure in columns[0]:
        old = f"  {others.get(figure.name, ''):>7}" if len(columns) > 1 else ""
        bound = BOUNDS.get(figure.name)
        mark = "  above" if bound is not None and figure.value > bound else ""
        rows.append(f"{figure.name:{width}}  {figure.value:>7}{old}  {'' if bound is None else bound:>7}{mark}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the source to measure")
    parser.add_argument("--old", type=Path, help="another src folder to compare with")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a number is above its bound")
    parser.add_argument("--details", action="store_true", help="say what every number is made of")
    parser.add_argument("--static", action="store_true", help="only what can be read without running anything")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps([vars(figure) for figure in MEASURES[options.measure]()]))
        return 0
    columns = []
    for src in [options.src, *([options.old] if options.old else [])]:
        columns.append(source_figures(src.resolve()) + ([] if options.static else running_figures(src.resolve())))
    if options.json:
        print(json.dumps({figure.name: figure.value for figure in columns[0]}, indent=2, ensure_ascii=False))
    else:
        print(table(columns))
    for figure in columns[0] if options.details and not options.json else []:
        print(f"\n{figure.name}: {figure.value}", *figure.detail, sep="\n  ")
    above = [figure.name for figure in columns[0] if figure.value > BOUNDS.get(figure.name, figure.value)]
    return 1 if options.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
