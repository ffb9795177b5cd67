"""`evenmoe` on the command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import os
import sys

import typer

from evenmoe.cli import commands as _commands  # noqa: F401 (importing a command adds it)
from evenmoe.cli.root import app
from evenmoe.errors import EvenmoeError


def main() -> None:
    """Run a command.

    Exit codes: 0 done; 1 a check failed; 2 the call or its input was wrong, or a file could not be read or written;
    130 interrupted.
    """
    try:
        app()
    except EvenmoeError as error:
        typer.echo(f"evenmoe: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe went away, which is no mistake; and nothing may be flushed into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        what = f"`{error.filename}`: " if error.filename else ""
        typer.echo(f"evenmoe: {what}{error.strerror or error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
