"""`evenmoe synthesise`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenmoe.cli.root import Json, app
from evenmoe.traces.models import MODELS

_PARAMETERS = "In place of what was fitted to measured traces"


def _list_models(wanted: bool) -> None:
    if wanted:
        print(
            f"{'model':<18} {'MoE layers':<16} {'experts':>7} {'top-k':>5} {'hidden':>6} {'inner':>6} {'MB/expert':>9}"
        )
        for shape in MODELS.values():
            layers = f"{shape.num_layers} ({shape.layer_ids[0]}-{shape.layer_ids[-1]})"
            print(
                f"{shape.name:<18} {layers:<16} {shape.num_experts:>7} {shape.top_k:>5} {shape.hidden:>6} "
                f"{shape.intermediate:>6} {shape.expert_bytes / 1e6:>9.1f}"
            )
        raise typer.Exit


@app.command(epilog="Models: " + ", ".join(MODELS))
def synthesise(
    out: Annotated[str, typer.Option("--out", "-o", help="Trace to write (.npz), `-` for standard output.")],
    model: Annotated[str, typer.Option(help="Model whose shape and character the trace has.")] = "deepseek-v3",
    windows: Annotated[int, typer.Option(help="Windows.", min=1)] = 64,
    tokens_per_window: Annotated[int, typer.Option(help="Tokens of every window.", min=1)] = 4096,
    requests: Annotated[int, typer.Option(help="Requests that share a window.", min=1)] = 8,
    request_windows: Annotated[int, typer.Option(help="Windows that a request lives.", min=1)] = 1,
    num_layers: Annotated[int | None, typer.Option(help="Only the first so many MoE layers.", min=1)] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Also every token's experts.")] = False,
    source_ranks: Annotated[int | None, typer.Option(help="Also the load by so many source ranks.", min=1)] = None,
    skew: Annotated[
        float | None, typer.Option(rich_help_panel=_PARAMETERS, help="Between experts: deviation of log-popularity.")
    ] = None,
    drift: Annotated[
        float | None, typer.Option(rich_help_panel=_PARAMETERS, help="Between requests: deviation of log-popularity.")
    ] = None,
    locality: Annotated[
        float | None, typer.Option(rich_help_panel=_PARAMETERS, help="Luck that stays for the next token, 0 to 0.99.")
    ] = None,
    comovement: Annotated[
        float | None, typer.Option(rich_help_panel=_PARAMETERS, help="Drift's part in the strongest factor, 0 to 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same options give the same bytes.", min=0)] = 0,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Show all models and exit.", callback=_list_models, is_eager=True)
    ] = False,
    json: Json = False,
) -> None:
    """Make up a trace that behaves like the measured ones.

    Skew between experts, drift between requests, locality between tokens and co-movement of experts were fitted to real
    routing; the summary shows what the trace has. With `-` as output the summary goes to standard error.
    """
    from evenmoe.cli.synthesis import run_synthesise

    run_synthesise(
        out,
        as_json=json,
        model=model,
        num_windows=windows,
        tokens_per_window=tokens_per_window,
        requests=requests,
        request_windows=request_windows,
        num_layers=num_layers,
        skew=skew,
        drift=drift,
        locality=locality,
        common_factor_share=comovement,
        routing=routing,
        source_ranks=source_ranks,
        seed=seed,
    )
