"""`evenmoe` on the command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evenmoe import __version__
from evenmoe.errors import EvenmoeError

app = typer.Typer(
    help="Expert-parallel load balancing for Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing to run on: an .npz with `load` (windows, layers, experts), optionally `routing`."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks of the trace's world, as threads.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of tokens, weights and the synthetic trace.", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Run the whole chain on this machine and compare it with a dense model.

    Plans a placement for the trace, then runs update_expert, dispatch, real expert matrix products, combine, residual
    and RmsNorm on every rank. Exits with 1 if any value is farther from the dense model than rounding explains.
    Under torchrun the ranks are its processes, otherwise threads.
    """
    from evenmoe.cli.demo import run_demo

    if not run_demo(trace, ranks, seed, as_json=json):
        raise typer.Exit(1)


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


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 a check failed, 2 the call or its input was wrong."""
    try:
        app()
    except EvenmoeError as error:
        typer.echo(f"evenmoe: {error}", err=True)
        sys.exit(2)
