"""How a command is made of a dataclass, and what commands have in common: options, and how they print.

A command is a frozen dataclass: its fields are the arguments and options, its docstring is the help, and `run` does the
work. `make_command` turns it into what typer runs. A module of a command imports what is heavy inside its functions, so
that its help does not need it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TextIO, get_args, get_type_hints

import typer
from typer import Option
from typer.models import OptionInfo

from evenmoe.engines import ENGINES
from evenmoe.errors import ConstraintError, EvenmoeError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.rules import RULES

if TYPE_CHECKING:
    from rich.console import Console

    from evenmoe.engines.engine import Engine
    from evenmoe.formats.contents import ReadOptions

SCHEMA = 1  #: version of what `--json` prints, described in docs/json.md; a key that changes its meaning raises it
_RANKS_PER_NODE = 8  # of nearly every server with more than one accelerator


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has.

    Attributes:
        epilog: what is shown below its options.
        words: names that errors of the Python interface use, and what they are called here; options are found without.
    """

    epilog: ClassVar[str | None] = None
    words: ClassVar[Mapping[str, str]] = {}

    json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False

    def run(self) -> int:
        """Do the work; returns the exit code.

        Raises:
            EvenmoeError, OSError: something is wrong with the call or with a file.
        """
        raise NotImplementedError


def completed(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell offers for an option's value: those of the names that begin with what is typed."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Rule = Annotated[
    str,
    Option(
        help=f"How tokens choose a replica: {', '.join(RULES)}; or py:module:attribute.",
        autocompletion=completed(RULES),
    ),
]


def for_option(help: str) -> OptionInfo:
    """The option that names a serving engine, the same for all commands."""
    return Option("--for", help=f"{help}: {', '.join(ENGINES)}.", metavar="ENGINE", autocompletion=completed(ENGINES))


def find_engine(name: str | None) -> Engine | None:
    """Return the engine that --for names, None where it is not given.

    Raises:
        ConstraintError: there is none; it names the flag.
    """
    try:
        return None if name is None else ENGINES.get(name)
    except ConstraintError as error:
        raise ConstraintError("--for", error.value, error.rule, error.fix) from None


def out_option(help: str) -> OptionInfo:
    """The option that names what is written, the same for all commands."""
    return Option("--out", "-o", help=help)


def check_no_stream(flag: str, path: Path | None) -> None:
    """Raise ConstraintError for `-`, where the summary has standard output; else a file would get that name."""
    if str(path) == "-":
        rule = "must be the name of what is written, since standard output has the summary"
        raise ConstraintError(flag, "-", rule, "use a name")


def find_format(flag: str, name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConstraintError: there is none; it names the flag.
    """
    try:
        return FORMATS.get(name)
    except ConstraintError as error:
        raise ConstraintError(flag, error.value, error.rule, error.fix) from None


@dataclass(frozen=True, kw_only=True)
class FileOptions(Command):
    """What the file of a load or of a placement may not say itself."""

    from_: Annotated[
        str | None,
        Option(
            "--from",
            help="Format to read; detected automatically by default.",
            metavar="FORMAT",
            autocompletion=completed(FORMATS),
        ),
    ] = None
    map_: Annotated[
        Path | None, Option("--map", help="Placement under which a load per slot was counted, in any format.")
    ] = None
    layers: Annotated[
        str | None,
        Option(help="Only these, in the file's numbering: first:end (end left out), first:end:step, or one number."),
    ] = None
    num_layers: Annotated[
        int | None, Option(help="Layers, where the file leaves open how many: the error says which count.", min=1)
    ] = None
    experts: Annotated[int | None, Option(help="Logical experts. Default: those that the file shows.", min=1)] = None
    first_layer: Annotated[
        int | None,
        Option(
            help="The model's number of its first MoE layer, where a file has none: 3 for DeepSeek-V3, 0 without dense "
            "layers.",
            min=0,
        ),
    ] = None

    def given_of_file(self) -> list[tuple[str, object]]:
        """[(flag, value)] of those options that were given."""
        flags = {"--from": self.from_, "--map": self.map_, "--layers": self.layers}
        flags |= {"--num-layers": self.num_layers, "--experts": self.experts, "--first-layer": self.first_layer}
        return [(flag, value) for flag, value in flags.items() if value is not None]

    def sizes(self) -> ReadOptions:
        """What a reader is told, without the placement of --map.

        Raises:
            ConstraintError: --from is no format.
        """
        from evenmoe.formats.contents import ReadOptions

        if self.from_ is not None:
            find_format("--from", self.from_)
        return ReadOptions(
            format=self.from_,
            layers=self.layers,
            num_experts=self.experts,
            num_layers=self.num_layers,
            first_layer=self.first_layer,
        )

    def read_options(self) -> ReadOptions:
        """What a reader is told, with the placement of --map.

        Raises:
            ConstraintError: --map is no placement.
        """
        options = self.sizes()
        if self.map_ is None:
            return options
        from evenmoe.formats.contents import ReadOptions
        from evenmoe.formats.reading import read_placement

        # Which ranks have the slots does not matter; their number is for maps that do not say it.
        known = ReadOptions(num_experts=options.num_experts, num_ranks=options.num_ranks)
        found = read_placement(self.map_, known, argument="--map", ranks_matter=False)
        return dataclasses.replace(options, placement=found.placement, placement_layers=found.layer_ids)


@dataclass(frozen=True, kw_only=True)
class PlacementFileOptions(FileOptions):
    """What the file of a placement may not say itself."""

    ranks: Annotated[int | None, Option(help="Ranks that share the slots, where the file does not say.", min=1)] = None
    slots: Annotated[int | None, Option(help="Total slots, of the placement `trivial`.", min=1)] = None
    shared_devices: Annotated[
        int | None, Option(help="Devices of an Ascend map that hold only the shared expert.", min=0)
    ] = None

    def sizes(self) -> ReadOptions:
        """As in `FileOptions`."""
        return dataclasses.replace(
            super().sizes(), num_ranks=self.ranks, num_slots=self.slots, shared_devices=self.shared_devices
        )


@dataclass(frozen=True, kw_only=True)
class WorldOptions(Command):
    """The world that a plan is for."""

    nodes: Annotated[int | None, Option(help="Nodes. Default: of 8 ranks each where that divides, else 1.", min=1)] = (
        None
    )
    groups: Annotated[int, Option(help="Expert groups, each kept inside a node; 1 for none.", min=1)] = 1

    def num_nodes(self, ranks: int) -> int:
        """Nodes of a world of so many ranks."""
        if self.nodes is not None:
            return self.nodes
        return ranks // _RANKS_PER_NODE if ranks % _RANKS_PER_NODE == 0 else 1


def make_command(name: str, kind: type[Command]):
    """The command `name` as click has it; its help shows the options of its own before those that it shares."""
    hints = get_type_hints(kind, include_extras=True)
    order = [*vars(kind)["__annotations__"], *(name for name in hints if name != "json"), "json"]
    fields = sorted(dataclasses.fields(kind), key=lambda field: order.index(field.name))
    words = {**_words(fields, hints), **kind.words}

    def call(**given: object) -> None:
        try:
            code = kind(**given).run()  # pyright: ignore[reportArgumentType]
        except EvenmoeError as error:
            raise in_flags(error, words) from error
        if code:
            raise typer.Exit(code)

    call.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields
        ]
    )
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help=inspect.getdoc(kind), epilog=kind.epilog)(call)
    return typer.main.get_command(app)


def _words(fields: list[dataclasses.Field], hints: Mapping[str, object]) -> dict[str, str]:
    """{name in Python: flag}: the option's own name, and with `num_` in front."""
    flags = {}
    for field in fields:
        _, option, *_ = get_args(hints[field.name])
        if isinstance(option, OptionInfo):
            named = [text for text in (option.default, *(option.param_decls or ())) if str(text).startswith("--")]
            flags[field.name.rstrip("_")] = str(named[0]) if named else "--" + field.name.replace("_", "-")
    return {**{f"num_{name}": flag for name, flag in flags.items()}, **flags}


def in_flags(error: EvenmoeError, words: Mapping[str, str]) -> EvenmoeError:
    """The same error in the words of the command line: flags in place of the names of the Python interface.

    >>> from evenmoe.errors import ConstraintError
    >>> print(in_flags(ConstraintError("num_slots", 18, "must be a multiple of num_ranks", "pass it"),
    ...     {"num_slots": "--slots", "num_ranks": "--ranks"}))
    `--slots` is 18: it must be a multiple of --ranks; pass it.
    """

    def known(found: re.Match[str]) -> str:
        return words.get(found[1], found[0])

    def translated(text: str) -> str:
        text = re.sub(r"\b\w+ \((--[a-z-]+)\)", r"\1", text)  # a name whose flag stands behind it already
        text = re.sub(r"\b(\w+)=(?!\w)", known, text)  # pass previous=
        return re.sub(r"\b(\w+_\w+)\b", known, in_backticks(text))

    def in_backticks(text: str) -> str:
        return re.sub(r"(?<=`)(\w+)(?=`)", known, text)

    argument = words.get(error.argument, error.argument)
    return type(error)(argument, in_backticks(error.value), translated(error.rule), translated(error.fix))


def numbers_of(flag: str, text: str | None) -> tuple[int, ...]:
    """The numbers that a list such as "3,7" or "8-15" names, ascending; none where the option is not given.

    Raises:
        ConstraintError: it is no such list; it names the flag.

    >>> numbers_of("--dead", "8-10,3")
    (3, 8, 9, 10)
    """
    numbers: set[int] = set()
    for part in [] if text is None else text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise ConstraintError(flag, repr(text), "must be numbers, or ranges from low to high", "write 3,7 or 8-15")
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers))


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
