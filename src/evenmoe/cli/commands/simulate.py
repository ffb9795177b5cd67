"""`evenmoe simulate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evenmoe.cli.file_options import Map
from evenmoe.cli.root import Json, app

_WORLD, _POLICIES, _COSTS, _RESULTS = "World", "Policies", "Costs, in place of the model's", "Results"

_POLICY_HELP = (
    "NAME[:key=value,...], once per policy. identity (always compared with): rule. static: rule, slots, groups, "
    "window, pieces, planner, plan-for. greedy (published): rule, slots, groups, refresh, window. evenmoe: rule, "
    "slots, groups, refresh, window, pieces, plan-for, max-copies, target-par, start=first|previous|scratch. oracle: "
    "rule, slots, groups, planner, plan-for. Rules: rank, token, occurrence, batch, even. Without any: all kinds."
)


@app.command(short_help="Replay a trace under several policies, without a GPU.")
def simulate(
    trace: Annotated[
        str, typer.Argument(help="A trace (.npz), a load in any format, or synthetic:MODEL for a made-up one.")
    ],
    map_: Map = None,
    model: Annotated[str | None, typer.Option(help="Sizes of experts and rows. Default: told by the trace.")] = None,
    ranks: Annotated[int, typer.Option(rich_help_panel=_WORLD, min=1, help="Ranks; each owns tokens and slots.")] = 32,
    nodes: Annotated[
        int | None, typer.Option(rich_help_panel=_WORLD, min=1, help="Nodes. Default: 8 ranks each, if that divides.")
    ] = None,
    tokens_per_rank: Annotated[
        int, typer.Option(rich_help_panel=_WORLD, min=1, help="Tokens of every rank in every step.")
    ] = 128,
    chunk: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_WORLD,
            min=1,
            help="Of those, consecutive ones of one request: 1 is decode. Default: all, prefill.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(rich_help_panel=_WORLD, min=1, help="Experts per token, if the trace does not say.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: once through the trace's tokens; 100 if it has only loads.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", rich_help_panel=_POLICIES, help=_POLICY_HELP)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(rich_help_panel=_POLICIES, min=1, help="Default: one a rank more than needed.")
    ] = None,
    groups: Annotated[
        int, typer.Option(rich_help_panel=_POLICIES, min=1, help="Expert groups that plans keep inside nodes.")
    ] = 1,
    refresh: Annotated[
        int | None, typer.Option(rich_help_panel=_POLICIES, min=1, help="Steps between plans. Default: steps / 10.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(rich_help_panel=_POLICIES, min=1, help="Past steps a plan is made from. Default: --refresh."),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(rich_help_panel=_COSTS, min=1, help="Numbers in a row, of 2 bytes each.")
    ] = None,
    expert_flops: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="FLOP of one expert per row.")
    ] = None,
    expert_bytes: Annotated[float | None, typer.Option(rich_help_panel=_COSTS, help="Weights of one expert.")] = None,
    copy_bytes: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="Bytes that one copied expert sends.")
    ] = None,
    dispatch_row_bytes: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="Bytes of a row to an expert.")
    ] = None,
    combine_row_bytes: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="Bytes of a row back.")
    ] = None,
    flops_per_s: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="FLOP/s a rank achieves. Default: 4.95e14.")
    ] = None,
    memory_bytes_per_s: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="Reading weights, bytes/s. Default: 3.35e12.")
    ] = None,
    within_bytes_per_s: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="A rank's link inside its node. Default: 1.6e11.")
    ] = None,
    between_bytes_per_s: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="A rank's link to other nodes. Default: 5e10.")
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option(rich_help_panel=_COSTS, help="Of one exchange, microseconds. Default: 20.")
    ] = None,
    row_per_expert: Annotated[
        bool,
        typer.Option(
            "--row-per-expert", rich_help_panel=_COSTS, help="Step times with a row per expert instead of per rank."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel=_RESULTS, help="Write everything, for `evenmoe report`.")
    ] = None,
    report: Annotated[Path | None, typer.Option(rich_help_panel=_RESULTS, help="Write the HTML page at once.")] = None,
    details: Annotated[
        bool,
        typer.Option("--details", rich_help_panel=_RESULTS, help="Keep every rank's load in every step and layer."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of draws, planners and a synthetic trace.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; the numbers do not depend on it. Default: one per processor.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay a trace under several policies: balance, rows on the wire, copies, time, memory.

    A trace with tokens is replayed pick by pick; from loads alone, counts are drawn. Plans see only steps that are
    over. Times come from a model of the experts and the wire alone, whose every figure is an option. Exit codes: 0
    done; 2 an option, the trace or a file is wrong.
    """
    from evenmoe.cli.simulation import Choices, run_simulation

    figures = {
        "expert_flops_per_token": expert_flops,
        "expert_bytes": expert_bytes,
        "copy_bytes": copy_bytes,
        "dispatch_row_bytes": dispatch_row_bytes,
        "combine_row_bytes": combine_row_bytes,
        "flops_per_s": flops_per_s,
        "memory_bytes_per_s": memory_bytes_per_s,
        "within_bytes_per_s": within_bytes_per_s,
        "between_bytes_per_s": between_bytes_per_s,
        "latency_us": latency_us,
    }
    run_simulation(
        Choices(
            trace=trace,
            model=model,
            ranks=ranks,
            nodes=nodes,
            tokens_per_rank=tokens_per_rank,
            chunk=chunk,
            top_k=top_k,
            steps=steps,
            policies=tuple(policy or ()),
            slots=slots,
            groups=groups,
            refresh=refresh,
            window=window,
            hidden=hidden,
            figures={name: value for name, value in figures.items() if value is not None},
            row_per_expert=row_per_expert,
            out=out,
            report=report,
            details=details,
            seed=seed,
            workers=workers,
            map=map_,
            command=("evenmoe", *sys.argv[1:]),
        ),
        as_json=json,
    )
