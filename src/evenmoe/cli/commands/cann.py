"""`evenmoe cann`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.root import app


@app.command()
def cann(
    out: Annotated[Path, typer.Option(help="Where the tree `latest` is written; the cann_path of a build script.")],
) -> None:
    """Write headers and libraries that run C++ programs for Ascend's operators on this machine's CPU.

    The tree has latest/include, latest/lib64 and latest/bin/setenv.bash; a program written for CANN compiles against it
    unchanged. Needs g++. A tree of an earlier run is replaced.
    """
    from evenmoe.ascend.cann.build import build_tree

    typer.echo(f"source {build_tree(out)}/bin/setenv.bash")
