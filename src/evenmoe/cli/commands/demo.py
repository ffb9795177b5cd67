"""`evenmoe demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.root import Json, app


@app.command(short_help="Run the whole chain here and compare it with a dense model.")
def demo(
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing to run on: an .npz with `load` (windows, layers, experts), optionally `routing`."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks of the trace's world, as threads.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of tokens, weights and the synthetic trace.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Run the whole chain on this machine and compare it with a dense model.

    Plans a placement for the trace, then runs update_expert, dispatch, real expert matrix products, combine, residual
    and RmsNorm on every rank. Exits with 1 if any value is farther from the dense model than rounding explains.
    Under torchrun the ranks are its processes, otherwise threads.
    """
    from evenmoe.cli.demo import run_demo

    if not run_demo(trace, ranks, seed, as_json=json):
        raise typer.Exit(1)
