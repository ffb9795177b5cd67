"""`evenmoe convert`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from typer import Argument, Option

from evenmoe.cli.options import PlacementFileOptions, completed, make_command, print_json, print_notes, sizes_text
from evenmoe.formats.catalogue import ENTRIES, FORMATS

if TYPE_CHECKING:
    from evenmoe.formats.contents import Contents, ReadOptions


def _list_formats(wanted: bool) -> None:
    if wanted:
        for name in FORMATS:
            entry = ENTRIES.get(name) or FORMATS.get(name).entry  # evenmoe's own need no module of a tool
            print(f"{name:<24} {entry.kind:<10} {', '.join(entry.containers):<18} {entry.description}")
        raise typer.Exit


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(PlacementFileOptions):
    """Convert a placement or a load from any tool's format to another's.

    The source's format is detected automatically. What the target cannot hold is said; a target that exists is replaced
    only once the new file is complete. With `-` as target the summary goes to standard error.
    """

    epilog: ClassVar = "Formats: " + ", ".join(FORMATS) + ". --list-formats describes them."
    words: ClassVar = {"format": "--to"}  # that of --from has been checked

    source: Annotated[str, Argument(help="File, folder, `-` for standard input, inline JSON, or `trivial`.")]
    target: Annotated[str, Argument(help="File or folder to write, `-` for standard output.")]
    to: Annotated[str, Option(help="Format to write.", metavar="FORMAT", autocompletion=completed(FORMATS))]
    hidden_layers: Annotated[
        int | None,
        Option(help="The model's hidden layers, from whose number its MTP layers count: 61 for DeepSeek-V3.", min=1),
    ] = None
    list_formats: Annotated[
        bool, Option("--list-formats", help="Describe every format and exit.", callback=_list_formats, is_eager=True)
    ] = False

    def sizes(self) -> ReadOptions:
        """As in `PlacementFileOptions`."""
        return dataclasses.replace(super().sizes(), num_hidden_layers=self.hidden_layers)

    def run(self) -> int:
        """Convert, and say what was read, written, dropped and assumed."""
        from evenmoe.formats.writing import convert

        done = convert(self.source, self.target, self.to, self.read_options())
        out = sys.stderr if self.target == "-" else sys.stdout
        source, sizes = done.contents, _sizes(done.contents)
        if self.json:
            summary = {"source": self.source, "target": self.target, "from": source.format, "to": done.format}
            print_json({**summary, "kind": source.kind, **sizes, "notes": list(done.notes)}, out)
        else:
            print(f"{self.source} ({source.format}: {sizes_text(sizes)}) -> {self.target} ({done.format})", file=out)
            print_notes(done.notes)
        return 0


def _sizes(contents: Contents) -> dict[str, int]:
    if contents.kind == "load":
        assert contents.load is not None
        names = ("num_windows", "num_layers", "num_experts")
        return {**dict(zip(names, contents.load.shape, strict=True)), "num_empty_windows": contents.empty_windows}
    return {name: getattr(contents.placement, name) for name in ("num_layers", "num_slots", "num_experts")}


command = make_command("convert", ConvertCommand)
