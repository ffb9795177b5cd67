"""`evenmoe cann`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from evenmoe.cli.options import Command, check_no_stream, make_command, out_option, print_json


@dataclass(frozen=True, kw_only=True)
class CannCommand(Command):
    """Write headers and libraries that run C++ programs for Ascend's operators on this machine's CPU.

    The tree has latest/include, latest/lib64 and latest/bin/setenv.bash; a program written for CANN compiles against it
    unchanged. Needs g++. A tree of an earlier run is replaced. Exit codes: 0 done; 2 nothing can be built here.
    """

    out: Annotated[Path, out_option("Where the tree `latest` is written; the cann_path of a build script.")]
    limits: Annotated[
        str,
        Option(help='What the operators take: "atlas-a3-2025", "atlas-a3-2026" or, by either, "atlas-a3".'),
    ] = "atlas-a3"

    def run(self) -> int:
        """Build the tree, and print what a shell sources."""
        from evenmoe.ascend.cann.build import build_tree

        check_no_stream("--out", self.out)
        tree = build_tree(self.out, self.limits)
        setenv = tree / "bin" / "setenv.bash"
        if self.json:
            print_json({"tree": str(tree), "setenv": str(setenv)})
        else:
            print(f"source {setenv}")
        return 0


command = make_command("cann", CannCommand)
