"""Standard input, output and error of the command line, on whatever terminal and however they were closed."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1  #: version of what `--json` prints, described in docs/json.md; a key that changes its meaning raises it

_HANDLER = "evenmoe.plain"
#: What stands for the characters of our texts that Unicode itself does not reduce to ASCII.
_PLAIN = {"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "µ": "u", "∞": "inf"}  # noqa: RUF001 (the field's signs)


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


def print_json(found: Mapping[str, object], file: TextIO | None = None) -> None:
    """Print the object of `--json` on one line, its schema's version first; on standard output by default.

    JSON has neither infinity nor nan: a number that is not finite becomes null.

    >>> print_json({"copies": 3, "break_even_steps": math.inf})
    {"schema": 1, "copies": 3, "break_even_steps": null}
    """
    print(json.dumps(_finite({"schema": SCHEMA, **found}), allow_nan=False), file=file)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def silence(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python would try once more to write it when it ends."""
    with suppress(OSError):  # in a test it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_notes(notes: Iterable[str]) -> None:
    """Print what was dropped or assumed, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Return {"num_layers": 2, ...} as words; empty windows only where there are any."""
    shown = {name: value for name, value in sizes.items() if value or name != "num_empty_windows"}
    return ", ".join(f"{value} {name.removeprefix('num_').replace('_', ' ')}" for name, value in shown.items())


def table_console(file: TextIO, width: int = 160) -> Console:
    """Return a console as wide as the terminal; elsewhere so wide that a row stays on one line."""
    from rich.console import Console

    return Console(file=file) if file.isatty() else Console(file=file, width=width)


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
