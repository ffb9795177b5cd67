"""The command line's root: `app`, to which every file of `commands` adds one command."""

from __future__ import annotations

from typing import Annotated

import typer

from evenmoe import __version__

app = typer.Typer(
    help="Expert-parallel load balancing for Mixture-of-Experts models.",
    epilog="Exit codes: 0 done; 1 a check failed; 2 the call, a file or a folder is wrong; 70 a bug; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich and its Markdown would double the 0.15 s of --help
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
