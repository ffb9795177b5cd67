"""What `evenmoe synthesise` does and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from evenmoe.cli.streams import print_json
from evenmoe.io.output import write_standard_output
from evenmoe.traces.statistics import common_factor_share, drift, gini, locality, skew
from evenmoe.traces.synthesis import synthesize
from evenmoe.traces.trace import Trace, save_trace, trace_bytes


def run_synthesise(out: str, *, as_json: bool, **arguments: Any) -> None:
    """Make up a trace, write it, show its statistics."""
    with Console(stderr=True).status("making up the trace …"):
        trace = synthesize(**arguments)
        if out == "-":
            data = trace_bytes(trace, "standard output")
            write_standard_output(data)
            size = len(data)
        else:
            save_trace(out, trace)
            size = Path(out).stat().st_size
        statistics = _statistics(trace)
    stream = sys.stderr if out == "-" else sys.stdout
    summary = {
        "file": out,
        "file_bytes": size,
        "windows": trace.num_windows,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "tokens": trace.num_windows * int(trace.metadata["tokens_per_window"]),
        "routing": trace.routing is not None,
        "source_ranks": None if trace.load_by_rank is None else trace.load_by_rank.shape[1],
        "parameters": dict(trace.metadata),
        "statistics_median_of_layers": statistics,
    }
    if as_json:
        print_json(summary, stream)
        return
    print(
        f"{out}: {summary['windows']} windows of {trace.metadata['tokens_per_window']} tokens, {summary['layers']} "
        f"layers, {summary['experts']} experts, top-{trace.metadata['top_k']}; {size:,} bytes",
        file=stream,
    )
    for name, value in statistics.items():
        print(f"  {name:<28} {value:.3f}", file=stream)


def _statistics(trace: Trace) -> dict[str, float]:
    """Median over layers; see `evenmoe.traces.statistics` for what each is."""
    found = {
        "busiest_over_mean_expert": float(np.median(skew(trace.load))),
        "gini": float(np.median(gini(trace.load))),
    }
    if trace.num_windows > 1:
        found["drift_between_windows"] = float(np.median(drift(trace.load)))
        found["comovement_of_one_factor"] = common_factor_share(trace.load, 1)
    if trace.routing is not None:
        found["locality_of_neighbours"] = float(np.median(locality(trace.routing, trace.seq_start)))
    return {name: round(value, 6) for name, value in found.items()}
