"""`evenmoe check`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenmoe.cli.file_options import Experts, FormatName, Layers, Map, NumLayers, Ranks, SharedDevices, Slots
from evenmoe.cli.root import Json, app


@app.command(short_help="Find what is wrong with a placement or a load.")
def check(
    file: Annotated[str, typer.Argument(help="File, folder, `-` for standard input, or inline JSON.")],
    from_: FormatName = None,
    ranks: Ranks = None,
    experts: Experts = None,
    layers: Layers = None,
    num_layers: NumLayers = None,
    slots: Slots = None,
    shared_devices: SharedDevices = None,
    map_: Map = None,
    json: Json = False,
) -> None:
    """Find what is wrong with a placement or a load of any tool: each finding names layer, rank and slot.

    Missing experts, twins on a rank, layers that are numbered wrongly, slots that do not divide, ranks of different
    sizes, replicas that the rank rule never reaches, counts that are negative or too large, layers without tokens.
    Exits with 0 if there is nothing but warnings, 1 if there is an error, 2 if the file cannot be read at all.
    """
    from evenmoe.cli.files import run_check

    clean = run_check(
        file,
        from_,
        layers,
        map_,
        as_json=json,
        num_ranks=ranks,
        num_experts=experts,
        num_layers=num_layers,
        num_slots=slots,
        shared_devices=shared_devices,
    )
    if not clean:
        raise typer.Exit(1)
