"""Options of the commands that read other tools' files: what a file may not say itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenmoe.formats.catalogue import FORMATS

FormatName = Annotated[
    str | None, typer.Option("--from", help="Format to read; told by content if left out.", metavar="FORMAT")
]
Ranks = Annotated[
    int | None, typer.Option("--ranks", help="Ranks that share the slots, where the file does not say.", min=1)
]
Experts = Annotated[
    int | None, typer.Option("--experts", help="Logical experts; default: as many as the file shows.", min=1)
]
NumLayers = Annotated[
    int | None, typer.Option("--num-layers", help="MoE layers, where dumps are appended or one list is for all.", min=1)
]
Slots = Annotated[int | None, typer.Option("--slots", help="Slots of the placement `trivial`.", min=1)]
SharedDevices = Annotated[
    int | None,
    typer.Option("--shared-devices", help="Devices of an Ascend map that hold only the shared expert.", min=0),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers", help="Only these, in the file's numbering: first:end (end left out), first:end:step, or one number."
    ),
]
Map = Annotated[
    Path | None, typer.Option("--map", help="Placement under which a load per slot was counted, in any format.")
]


def format_table() -> str:
    """Every format, a line each: name, what it holds, whose it is."""
    return "\n".join(
        f"{entry.name:<24} {entry.kind:<10} {'r' if entry.reads else '-'}{'w' if entry.writes else '-'}  "
        f"{', '.join(entry.containers):<18} {entry.description}"
        for entry in FORMATS.values()
    )
