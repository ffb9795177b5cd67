"""`evenmoe cann`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.root import Json, app
from evenmoe.cli.streams import print_json


@app.command(short_help="Write the C headers and libraries of CANN for this CPU.")
def cann(
    out: Annotated[Path, typer.Option(help="Where the tree `latest` is written; the cann_path of a build script.")],
    as_json: Json = False,
) -> None:
    """Write headers and libraries that run C++ programs for Ascend's operators on this machine's CPU.

    The tree has latest/include, latest/lib64 and latest/bin/setenv.bash; a program written for CANN compiles against it
    unchanged. Needs g++. A tree of an earlier run is replaced. Exit codes: 0 done; 2 nothing can be built here.
    """
    from evenmoe.ascend.cann.build import build_tree

    tree = build_tree(out)
    if as_json:
        print_json({"tree": str(tree), "setenv": str(tree / "bin" / "setenv.bash")})
    else:
        print(f"source {tree}/bin/setenv.bash")
