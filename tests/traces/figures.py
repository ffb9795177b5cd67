"""The figures of `sampling.MEASUREMENTS`, of measured traces and of synthetic ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evenmoe.traces.models import MODELS, ModelShape
from evenmoe.traces.sampling import Measurement
from evenmoe.traces.statistics import common_factor_share, drift, gini, locality, skew
from evenmoe.traces.synthesis import synthesize
from evenmoe.traces.trace import Trace, load_trace


def figure(name: str, traces: Sequence[Trace]) -> float:
    """`name` is a statistic's, with `_factors` or `_lag` behind it; several traces are joined."""
    statistic, _, number = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
    if statistic == "locality":
        routing = np.concatenate([t.routing for t in traces if t.routing is not None])
        lengths = np.concatenate([np.diff(t.seq_start) for t in traces if t.seq_start is not None])
        return float(np.median(locality(routing, np.cumsum([0, *lengths]), lag=int(number))))
    load = np.concatenate([t.load for t in traces])
    if statistic == "common_factor_share":
        return common_factor_share(load, int(number))
    return float(np.median({"skew": skew, "gini": gini, "drift": drift}[statistic](load)))


def shape_of(model: str, measurement: Measurement) -> ModelShape:
    layers, experts, top_k = measurement.shape
    known = MODELS.get(model)
    groups = (known.num_groups, known.top_groups) if known else (1, 1)
    return ModelShape(model, layers, experts, top_k, 1, 1, num_groups=groups[0], top_groups=groups[1])


def synthetic(model: str, measurement: Measurement, seed: int) -> Trace:
    routing = any(name.startswith("locality") for name in measurement.figures) or measurement.windows == 1
    return synthesize(
        shape_of(model, measurement),
        num_windows=measurement.windows,
        tokens_per_window=measurement.tokens,
        requests=1,
        routing=routing,
        seed=seed,
    )


def mean_figures(model: str, measurement: Measurement, seeds: Iterable[int], names: Iterable[str]) -> dict[str, float]:
    traces = [synthetic(model, measurement, seed) for seed in seeds]
    return {name: float(np.mean([figure(name, [trace]) for trace in traces])) for name in names}


def measured_traces(measurement: Measurement, folder: Path) -> list[Trace]:
    return [load_trace(folder / source.split()[0]) for source in measurement.sources]
