"""`evenmoe convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenmoe.cli.file_options import (
    Experts,
    FormatName,
    Layers,
    Map,
    NumLayers,
    Ranks,
    SharedDevices,
    Slots,
    format_table,
)
from evenmoe.cli.root import Json, app
from evenmoe.formats.catalogue import FORMATS


def _list_formats(wanted: bool) -> None:
    if wanted:
        print(format_table())
        raise typer.Exit


@app.command(
    short_help="Convert a placement or a load to another tool's format.",
    epilog="Formats: " + ", ".join(FORMATS) + ". --list-formats describes them.",
)
def convert(
    source: Annotated[str, typer.Argument(help="File, folder, `-` for standard input, inline JSON, or `trivial`.")],
    target: Annotated[str, typer.Argument(help="File or folder to write, `-` for standard output.")],
    to: Annotated[str, typer.Option("--to", help="Format to write.", metavar="FORMAT")],
    from_: FormatName = None,
    ranks: Ranks = None,
    experts: Experts = None,
    layers: Layers = None,
    first_layer: Annotated[
        int | None,
        typer.Option(help="The model's first MoE layer: 3 for DeepSeek-V3, 0 without dense layers.", min=0),
    ] = None,
    hidden_layers: Annotated[
        int | None,
        typer.Option(
            help="The model's hidden layers, from whose number its MTP layers count: 61 for DeepSeek-V3.", min=1
        ),
    ] = None,
    num_layers: NumLayers = None,
    slots: Slots = None,
    shared_devices: SharedDevices = None,
    map_: Map = None,
    list_formats: Annotated[
        bool,
        typer.Option("--list-formats", help="Describe every format and exit.", callback=_list_formats, is_eager=True),
    ] = False,
    json: Json = False,
) -> None:
    """Convert a placement or a load from any tool's format to another's.

    The source's format is told by its content. What the target cannot hold is said; a target that exists is replaced
    only once the new file is complete. With `-` as target the summary goes to standard error.
    """
    from evenmoe.cli.files import run_convert

    run_convert(
        source,
        target,
        to,
        from_,
        layers,
        first_layer,
        map_,
        as_json=json,
        num_ranks=ranks,
        num_experts=experts,
        num_layers=num_layers,
        num_slots=slots,
        shared_devices=shared_devices,
        num_hidden_layers=hidden_layers,
    )
