"""The code blocks of a page, run in order: what is not run is marked as output, and compared where it follows a run."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cli.running import Run

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([a-z_]+\.py)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind`, what stands behind the fence, and its text."""

    kind: str
    text: str
    follows: bool
    """Whether nothing but blank lines lies between it and the block before."""


def blocks_of(page: str) -> list[Block]:
    found, end = [], 0
    for match in FENCE.finditer(page):
        found.append(Block(match.group(1), match.group(2), end > 0 and not page[end : match.start()].strip()))
        end = match.end()
    return found


def like(wanted: str, printed: str) -> bool:
    """Whether a page's output is what was printed; a line `…` stands for any number of lines."""
    parts = [r"(?:.*\n)*?" if line == "…" else re.escape(line) + r"\s*?\n" for line in wanted.splitlines()]
    return re.fullmatch("".join(parts), printed) is not None


class Page:
    """Runs the blocks of a page in the folder that is current; `commands` counts those of evenmoe."""

    def __init__(self, run: Run) -> None:
        self.run, self.names, self.printed = run, {"__name__": "example"}, ""
        self.commands = 0

    def take(self, block: Block) -> None:
        kinds: dict[str, Callable[[str], Any]] = {
            "python": self.python,
            "sh": self.shell,
            "json": json.loads,
            "yaml": yaml.safe_load,
            "text": lambda text: None,
        }
        kind, _, title = block.kind.partition(" ")
        assert kind in kinds, f"a block of kind {block.kind!r}: it must be one of {', '.join(kinds)}, text being output"
        if title:  # lines of a file that a test of its own runs
            (path,) = re.fullmatch(r'title="([\w./]+)"', title).groups()
            lines = [line.strip() for line in (ROOT / path).read_text("utf-8").splitlines()]
            assert [line for line in map(str.strip, block.text.splitlines()) if line and line not in lines] == []
        elif kind == "text" and block.follows and self.printed:
            assert like(block.text, self.printed), self.printed
        else:
            self.printed = ""
            kinds[kind](block.text)

    def python(self, text: str) -> None:
        if named := FILE.match(text):
            Path(named.group(1)).write_text(text)
            return
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(text, "page", "exec"), self.names)
        self.printed = out.getvalue()

    def shell(self, text: str) -> None:
        """evenmoe's own run; of others, what they name must be there."""
        for line in text.splitlines():
            program, *rest = shlex.split(line, comments=True) or [""]
            if program == "evenmoe":
                done, self.commands = self.run(*rest), self.commands + 1
                assert done.code == 0, done.err
                self.printed += done.out
            elif program == "pip":
                assert rest[0] == "install"
                extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
                for name in rest[1:]:
                    package, _, asked = name.rstrip("]").partition("[")
                    assert package == "evenmoe"
                    assert set(asked.split(",")) - {""} <= set(extras)
            elif program == "make":
                makefile = (ROOT / "Makefile").read_text("utf-8")
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest)
            else:
                paths = [one for one in rest if re.match(r"(src|tests|tools|benchmarks|examples)/", one)]
                modules = [rest[i + 1] for i, one in enumerate(rest) if one == "-m" and "." in rest[i + 1]]
                paths += [module.replace(".", "/") + ".py" for module in modules]
                assert paths or program in ("", "pre-commit"), f"{line!r} is no command that this test knows"
                assert [path for path in paths if not (ROOT / path).exists()] == []
