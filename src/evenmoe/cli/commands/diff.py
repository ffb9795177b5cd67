"""`evenmoe diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenmoe.cli.file_options import Experts, Layers, NumLayers, Ranks, SharedDevices, Slots
from evenmoe.cli.root import Json, app


@app.command(short_help="Count what it takes to move from one placement to another.")
def diff(
    before: Annotated[str, typer.Argument(help="Placement in use: file, `-`, inline JSON, or `trivial`.")],
    after: Annotated[str, typer.Argument(help="Placement to move to, in any format.")],
    expert_bytes: Annotated[
        int | None, typer.Option(help="Bytes of one expert's weights in one layer, for the bytes to move.", min=0)
    ] = None,
    ranks: Ranks = None,
    experts: Experts = None,
    layers: Layers = None,
    first_layer: Annotated[
        int | None,
        typer.Option(help="The model's first MoE layer, where only one file counts dense layers.", min=0),
    ] = None,
    num_layers: NumLayers = None,
    slots: Slots = None,
    shared_devices: SharedDevices = None,
    json: Json = False,
) -> None:
    """Count what it takes to move from one placement to another: copies per layer and rank, bytes to move.

    A copy is an expert that a rank must receive because it did not hold it before. The options hold for both files.
    Exit codes: 0 done, whether they differ or not; 2 a file or an option is wrong.
    """
    from evenmoe.cli.files import run_diff

    run_diff(
        before,
        after,
        expert_bytes,
        layers,
        as_json=json,
        num_ranks=ranks,
        num_experts=experts,
        num_layers=num_layers,
        num_slots=slots,
        first_layer=first_layer,
        shared_devices=shared_devices,
    )
