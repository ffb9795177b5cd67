"""`evenmoe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.file_options import Experts, FormatName, Layers, Map, NumLayers
from evenmoe.cli.root import Json, app
from evenmoe.formats.catalogue import FORMATS

_LOAD, _GOAL, _FILE = "The load", "The goal", "The file"


@app.command(epilog="Formats of placements: " + ", ".join(n for n, f in FORMATS.items() if f.kind == "placement"))
def plan(
    source: Annotated[str, typer.Argument(help="Load or trace in any format, a folder, or `-` for standard input.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Placement to write, `-` for standard output. Default: none.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Expert-parallel ranks. Default: those of --previous.", min=1)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots on all ranks together. Default: those of --previous.", min=1)
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes that share the ranks evenly, in rank order.", min=1)] = 1,
    groups: Annotated[
        int, typer.Option(help="Expert groups, each kept inside a node where there are several nodes.", min=1)
    ] = 1,
    rule: Annotated[
        str, typer.Option(rich_help_panel=_GOAL, help="How tokens choose: even, rank, token, occurrence, batch.")
    ] = "even",
    mean: Annotated[
        bool,
        typer.Option(
            "--mean/--windows", rich_help_panel=_GOAL, help="Balance the sum of the recording, or its single windows."
        ),
    ] = False,
    most_windows: Annotated[
        int,
        typer.Option(rich_help_panel=_GOAL, help="Windows beyond so many are merged with their neighbours.", min=1),
    ] = 64,
    previous: Annotated[
        Path | None, typer.Option(rich_help_panel=_GOAL, help="Placement in use, in any format: start from it.")
    ] = None,
    max_copies: Annotated[
        int | None, typer.Option(rich_help_panel=_GOAL, help="At most so many copies per layer.", min=0)
    ] = None,
    target_par: Annotated[
        float | None, typer.Option(rich_help_panel=_GOAL, help="Stop copying in a layer once it is this even.")
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=_GOAL, help="Of the search's random choices.", min=0)] = 0,
    from_: FormatName = None,
    to: Annotated[
        str, typer.Option("--to", rich_help_panel=_FILE, help="Format to write.", metavar="FORMAT")
    ] = "evenmoe-placement",
    first_layer: Annotated[
        int | None,
        typer.Option(rich_help_panel=_FILE, help="The model's number of the first row, if the load has none.", min=0),
    ] = None,
    layers: Layers = None,
    experts: Experts = None,
    num_layers: NumLayers = None,
    map_: Map = None,
    json: Json = False,
) -> None:
    """Plan a placement for a recorded load.

    Reads loads and traces of any tool, writes the placement in any tool's format, and shows how even the ranks are
    before and after: the peak-to-average load (PAR), 1.0 being perfect. With `-` as output the summary goes to standard
    error. Exit codes: 0 done; 2 a file or an option is wrong.
    """
    from evenmoe.cli.planning import Order, run_plan

    order = Order(
        source,
        out,
        ranks,
        slots,
        nodes,
        groups,
        rule,
        mean,
        most_windows,
        previous,
        max_copies,
        target_par,
        seed,
        from_,
        to,
        first_layer,
        layers,
        experts,
        num_layers,
        map_,
    )
    run_plan(order, as_json=json)
