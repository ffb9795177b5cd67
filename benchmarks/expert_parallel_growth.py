"""How the exchange's cost grows with tokens, ranks, experts and experts per token: CPU µs per row, of all ranks.

    python benchmarks/expert_parallel_growth.py --json benchmarks/results/growth.json
    python benchmarks/expert_parallel_growth.py --draw docs/growth.svg --json benchmarks/results/growth.json

A row is what an expert computes: T · K on each rank. One size is varied at a time around T 256, H 2048, E 128, K 8 and
4 ranks; medians of few steps, contestants in turn, as in `benchmarks/expert_parallel.py`. With `--draw` nothing is
measured: the table is printed and the picture drawn from the figures in the file.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.exchange import results
from benchmarks.exchange.contestants import Work
from benchmarks.exchange.measure import measure
from evenmoe.io.output import whole_file
from evenmoe.report.drawing import SERIES_LIGHT, style

BASE = Work(256, 2048, 128)
GROWTH: dict[str, tuple[int, ...]] = {
    "tokens": (16, 64, 256, 1024, 4096),
    "ranks": (2, 4, 8, 16),
    "experts": (32, 128, 512),
    "top_k": (1, 2, 4, 8, 16),
}
TITLES = {"tokens": "tokens of a rank", "ranks": "ranks", "experts": "experts", "top_k": "experts per token"}
NAMES = (
    "ExpertParallel, threads",
    "ExpertParallel, shared_memory",
    "ExpertParallel, process_group",
    "raw all_to_all",
    "copies and sum",
)


def points(axes: Mapping[str, tuple[int, ...]]) -> dict[str, Work]:
    """The work to measure, by its name, each once."""
    varied = [replace(BASE, **{axis: value}) for axis, values in axes.items() for value in values]
    return {work.name: work for work in varied}


def per_row(found: Mapping[str, Any], work: Work, name: str) -> float:
    """CPU µs of all ranks together for each row that an expert computes."""
    return 1e3 * found["work"][work.name][name]["cpu_ms"] / (work.tokens * work.top_k * work.ranks)


def table(found: Mapping[str, Any]) -> str:
    """The measured points in Markdown, µs per row."""
    lines = [f"| | {' | '.join(NAMES)} |", "|---|" + "---|" * len(NAMES)]
    for axis, values in GROWTH.items():
        for value in values:
            work = replace(BASE, **{axis: value})
            if work.name in found["work"]:  # with --axes only some of them
                cells = [f"{per_row(found, work, name):.2f}" for name in NAMES]
                lines.append(f"| {value} {TITLES[axis]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any]) -> bytes:
    """The same as SVG, one panel for each size; equal figures give equal bytes."""
    with rc_context({"svg.hashsalt": "evenmoe", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10.0, 3.6), layout="constrained")
        for axes, (axis, values) in zip(figure.subplots(1, len(GROWTH), sharey=True), GROWTH.items(), strict=True):
            works = {value: replace(BASE, **{axis: value}) for value in values}
            measured = {value: work for value, work in works.items() if work.name in found["work"]}
            for number, name in enumerate(NAMES):
                costs = [per_row(found, work, name) for work in measured.values()]
                marker, color = style(number).marker.matplotlib, SERIES_LIGHT[number]
                axes.plot(list(measured), costs, marker=marker, markersize=4, color=color, label=name)
            axes.set(xscale="log", yscale="log", xlabel=TITLES[axis])
            axes.set_xticks(list(measured), [str(value) for value in measured])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("CPU µs per row, all ranks")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=GROWTH, default=list(GROWTH), help="the sizes that are varied")
    parser.add_argument("--steps", type=int, default=5, help="steps that are counted")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of other points")
    parser.add_argument("--draw", type=Path, metavar="SVG", help="draw what --json holds")
    given = parser.parse_args(words)
    if given.draw:
        if not given.json:
            parser.error("--draw needs --json, the figures to draw")
        found = results.read(given.json)
        with whole_file(given.draw) as file:
            file.write(draw(found))
        print(table(found))
        return 0
    load, measured = os.getloadavg()[0], {}
    before = results.read(given.json)["work"] if given.json and given.json.exists() else {}
    for name, work in points({axis: GROWTH[axis] for axis in given.axes}).items():
        measured[name] = measure(work, NAMES, given.steps)
        print(f"{name:28}" + "".join(f"{one.cpu_ms:10.1f}" for one in measured[name].values()), flush=True)
    found = results.document(measured, steps=given.steps, load_before=load, absent={})
    found["work"] = before | found["work"]
    if given.json:
        results.write(given.json, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
