"""`evenmoe synthesize`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from typer import Option

from evenmoe.cli.options import Command, completed, make_command, out_option, print_json
from evenmoe.traces.models import MODELS

if TYPE_CHECKING:
    from evenmoe.traces.trace import Trace


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


@dataclass(frozen=True, kw_only=True)
class SynthesizeCommand(Command):
    """Write a synthetic trace that behaves like the measured ones.

    Skew between experts, drift between requests, locality between tokens and the factor that experts have in common
    were fitted to real routing; the summary shows what the trace has. With `-` as output the summary goes to standard
    error.
    """

    epilog: ClassVar = "Models: " + ", ".join(MODELS)

    out: Annotated[str, out_option("Trace to write (.npz), `-` for standard output.")]
    model: Annotated[
        str, Option(help="Model whose shape and parameters the trace has.", autocompletion=completed(MODELS))
    ] = "deepseek-v3"
    windows: Annotated[int, Option(help="Windows.", min=1)] = 64
    tokens_per_window: Annotated[int, Option(help="Tokens of every window.", min=1)] = 4096
    requests: Annotated[int, Option(help="Requests that share a window.", min=1)] = 8
    request_windows: Annotated[int, Option(help="Windows that a request lives.", min=1)] = 1
    num_layers: Annotated[int | None, Option(help="Only the first so many MoE layers.", min=1)] = None
    routing: Annotated[bool, Option("--routing", help="Also every token's experts.")] = False
    source_ranks: Annotated[int | None, Option(help="Also the load by so many source ranks.", min=1)] = None
    skew: Annotated[
        float | None, Option(help="Skew between experts: standard deviation of log-popularity. Default: fitted.")
    ] = None
    drift: Annotated[
        float | None, Option(help="Drift between requests: standard deviation of log-popularity. Default: fitted.")
    ] = None
    locality: Annotated[
        float | None, Option(help="Part of a token's deviation that the next one shares, 0 to 0.99. Default: fitted.")
    ] = None
    common_factor_share: Annotated[
        float | None, Option(help="Share of drift in its strongest common factor, 0 to 1. Default: fitted.")
    ] = None
    seed: Annotated[int, Option(help="The same options give the same bytes.", min=0)] = 0
    list_models: Annotated[
        bool, Option("--list-models", help="Show all models and exit.", callback=_list_models, is_eager=True)
    ] = False

    def run(self) -> int:
        """Draw the trace, write it, show its statistics."""
        from rich.console import Console

        with Console(stderr=True).status("drawing a synthetic trace …"):
            trace, size = self._write()
            statistics = _statistics(trace)
        file = sys.stderr if self.out == "-" else sys.stdout
        if self.json:
            summary = {
                "target": self.out,
                "target_bytes": size,
                "num_windows": trace.num_windows,
                "num_layers": trace.num_layers,
                "num_experts": trace.num_experts,
                "num_tokens": trace.num_windows * self.tokens_per_window,
                "routing": trace.routing is not None,
                "num_source_ranks": None if trace.load_by_rank is None else trace.load_by_rank.shape[1],
                "parameters": dict(trace.metadata),
                "statistics_median_of_layers": statistics,
            }
            print_json(summary, file)
            return 0
        print(
            f"{self.out}: {trace.num_windows} windows of {self.tokens_per_window} tokens, {trace.num_layers} layers, "
            f"{trace.num_experts} experts, top-{trace.metadata['top_k']}; {size:,} bytes",
            file=file,
        )
        for name, value in statistics.items():
            print(f"  {name:<28} {value:.3f}", file=file)
        return 0

    def _write(self) -> tuple[Trace, int]:
        """The trace, and the bytes of its file."""
        from evenmoe.io.output import write_standard_output
        from evenmoe.traces.synthesis import synthesize
        from evenmoe.traces.trace import save_trace, trace_bytes

        trace = synthesize(
            self.model,
            num_windows=self.windows,
            tokens_per_window=self.tokens_per_window,
            requests=self.requests,
            request_windows=self.request_windows,
            num_layers=self.num_layers,
            skew=self.skew,
            drift=self.drift,
            locality=self.locality,
            common_factor_share=self.common_factor_share,
            routing=self.routing,
            source_ranks=self.source_ranks,
            seed=self.seed,
        )
        if self.out == "-":
            data = trace_bytes(trace, "standard output")
            write_standard_output(data)
            return trace, len(data)
        save_trace(trace, self.out)
        return trace, Path(self.out).stat().st_size


def _statistics(trace: Trace) -> dict[str, float]:
    """Median over layers; see `evenmoe.traces.statistics` for what each is."""
    import numpy as np

    from evenmoe.traces.statistics import common_factor_share, drift, gini, locality, skew

    found = {
        "busiest_over_mean_expert": float(np.median(skew(trace.load))),
        "gini": float(np.median(gini(trace.load))),
    }
    if trace.num_windows > 1:
        found["drift_between_windows"] = float(np.median(drift(trace.load)))
        found["common_factor_share"] = common_factor_share(trace.load, 1)
    if trace.routing is not None:
        found["locality_of_neighbors"] = float(np.median(locality(trace.routing, trace.seq_start)))
    return {name: round(value, 6) for name, value in found.items()}


command = make_command("synthesize", SynthesizeCommand)
