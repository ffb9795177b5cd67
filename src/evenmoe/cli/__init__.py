"""`evenmoe` on the command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import traceback
import unicodedata
from contextlib import suppress
from importlib import import_module
from typing import Annotated, TextIO

import typer
from typer import Option
from typer.core import TyperGroup

from evenmoe import __version__
from evenmoe.errors import ConstraintError, EvenmoeError
from evenmoe.io.output import STANDARD_OUTPUT

_WRONG, _INTERNAL, _INTERRUPTED = 2, 70, 130
_ADVICE = {
    errno.EACCES: "name a file in a folder that you may write to",
    errno.EPERM: "name a file in a folder that you may write to",
    errno.EROFS: "name a file in a folder that you may write to",
    errno.EBADF: "open it, or name a file",
    errno.EDQUOT: "free some space, or name a file on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EISDIR: "name a file, for this is a folder",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "make the folder first",
    errno.ENOSPC: "free some space, or name a file on another disk",
    errno.ENOTDIR: "name a folder that exists",
}
#: Each is a module of this package, which is imported when the command is called or completed.
COMMANDS = {
    "demo": "Run the whole chain here and compare it with a dense model.",
    "plan": "Plan a placement for a recorded load.",
    "advise": "Say whether balancing pays, in modeled time.",
    "simulate": "Replay a trace under several policies, without a GPU.",
    "report": "Show what a simulation found, as one HTML page.",
    "convert": "Convert a placement or a load to another tool's format.",
    "check": "Find what is wrong with a placement or a load.",
    "diff": "Count what it takes to move from one placement to another.",
    "synthesize": "Write a synthetic trace that behaves like the measured ones.",
    "cann": "Write the C headers and libraries of CANN for this CPU.",
}
_RENAMED = {"synthesise": "synthesize"}
_HANDLER = "evenmoe.plain"
#: What stands for the characters of our texts that Unicode itself does not reduce to ASCII.
_PLAIN = {"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "µ": "u", "∞": "inf"}  # noqa: RUF001 (the field's signs)


class _Commands(TyperGroup):
    """The commands by name."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name: str):
        if cmd_name in _RENAMED and not ctx.resilient_parsing:  # a shell completes nothing behind the old word
            new = _RENAMED[cmd_name]
            raise ConstraintError("evenmoe", cmd_name, f"is now called {new}", f"write evenmoe {new}")
        return import_module(f"evenmoe.cli.{cmd_name}").command if cmd_name in COMMANDS else None

    def format_commands(self, ctx, formatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=_Commands,
    help="Expert-parallel load balancing for Mixture-of-Experts models.",
    epilog="Exit codes: 0 done; 1 a check failed; 2 the call, a file or a folder is wrong; 70 a bug; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich and its Markdown would double the 0.15 s of --help
)


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def prepare_streams() -> None:
    """Let every text be printed, whatever the encoding, and let no file take the number of a closed stream.

    A descriptor that was closed when the process started would be given to the next file that is opened, and messages
    of C libraries would go into it. It is opened so that its use fails, as it would have failed closed.
    """
    for number, (name, flags) in enumerate([("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)]):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # open, and not Python's
            if os.open(os.devnull, flags) == number:  # the lowest that is free
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    codecs.register_error(_HANDLER, _in_plain_text)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def main() -> None:
    """Run a command.

    Exit codes: 0 done; 1 a check failed; 2 the call or its input was wrong, or a file could not be read or written;
    70 a mistake in evenmoe itself; 130 interrupted.
    """
    prepare_streams()
    try:
        code = _run()
        sys.stdout.flush()  # here and not when Python ends, where a failure would be a traceback
    except EvenmoeError as error:
        code = _say(str(error))
    except BrokenPipeError:  # the reader of a pipe went away, which is no mistake; and nothing may be flushed into it
        silence(sys.stdout)
        code = 0
    except OSError as error:
        code = _say(_os_error(error))
        if error.filename in (None, STANDARD_OUTPUT):
            silence(sys.stdout)
    except MemoryError as error:
        code = _say(f"out of memory{f' ({error})' if str(error) else ''}: check the sizes that were asked for.")
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        code = _say(_internal(error), _INTERNAL)
    sys.exit(code)


def silence(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python would try once more to write it when it ends."""
    with suppress(OSError):  # in a test it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run() -> int:
    try:
        app(prog_name="evenmoe")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0


def _say(message: str, code: int = _WRONG) -> int:
    with suppress(OSError):  # nobody can be told that standard error is full
        print(f"evenmoe: {message}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    if error.filename in (None, STANDARD_OUTPUT):
        name = f"{STANDARD_OUTPUT}: " if advice else ""  # which text is printed to without naming it
    else:
        name = f"`{error.filename}`: "
    return name + reason + (f"; {advice}." if advice else "")


def _internal(error: Exception) -> str:
    """One line, with what a report needs."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if "evenmoe" in frame.filename), frames[-1])
    what = " ".join(f"{type(error).__name__}: {error}".split())
    where = f"{place.filename.rpartition('evenmoe/')[2]}, line {place.lineno}"
    return f"a mistake in evenmoe, please report it with the command: {what} ({where})"


def _in_plain_text(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""For what a terminal's encoding has no character for.

    >>> "1…3 × 10⁻² é \udcff".encode("ascii", _HANDLER) if not prepare_streams() else None
    b'1...3 x 10-2 e \\udcff'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    reduced = "".join(
        _PLAIN.get(part, part) for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)
    )
    if character in _PLAIN or (reduced and reduced.isascii()):
        return _PLAIN.get(character, reduced)
    if unicodedata.category(character) == "So":  # frames and spinners
        return "*"
    return character.encode("ascii", "backslashreplace").decode()
