"""`evenmoe report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.root import Json, app


@app.command(short_help="Show what a simulation found, as one HTML page.")
def report(
    simulation: Annotated[Path, typer.Argument(metavar="INPUT", help="The file that `evenmoe simulate --out` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page; a file there is replaced.")] = Path(
        "report.html"
    ),
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Also write the pictures as PNGs.")] = None,
    json: Json = False,
) -> None:
    """Show what a simulation found: one HTML page and, with --png, its pictures.

    The page needs nothing beside itself: no script, no network, and the same input gives the same bytes. Exit codes: 0
    written; 2 INPUT is no simulation, or a file cannot be read or written.
    """
    from evenmoe.cli.report import run_report

    run_report(simulation, output, png, command=["evenmoe", *sys.argv[1:]], as_json=json)
