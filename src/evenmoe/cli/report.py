"""`evenmoe report`: read a simulation, write the page, say what is in it."""

from __future__ import annotations

import hashlib
import math
import shlex
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError
from evenmoe.report import quantities, write_report
from evenmoe.report.markup import shortened
from evenmoe.report.summary import Summary, best_policy, summarise
from evenmoe.simulator.store import load_simulation


def run_report(source: Path, output: Path, png: Path | None, command: list[str], *, as_json: bool) -> None:
    """Write the page and print its headline; `command` is shown on the page."""
    simulation = load_simulation(source)
    if output.exists() and output.samefile(source):
        raise ConstraintError("--output", output, "must not be the input", "name another file")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    written = write_report(simulation, output, shlex.join(command), {str(source): digest}, png)
    summaries = summarise(simulation)
    if as_json:
        found = _object(summaries, best_policy(simulation), written, {str(source): digest})
        print_json({**found, "empty_windows": simulation.empty_windows})
        return
    Console().print(_table(summaries))
    if simulation.empty_windows:
        print(f"{quantities.count(simulation.empty_windows)} empty windows of the trace left out")
    for path in written:
        print(f"{path}  {quantities.count(path.stat().st_size)} bytes")


def _object(summaries: tuple[Summary, ...], best: int, written: list[Path], inputs: dict[str, str]) -> dict[str, Any]:
    return {
        "page": str(written[0]),
        "pictures": [str(path) for path in written[1:]],
        "page_bytes": written[0].stat().st_size,
        "input_sha256": inputs,
        "best_policy": summaries[best].name,
        "policies": [
            {
                "name": summary.name,
                "mean_par": summary.mean_par,
                "worst_par": summary.worst_par,
                "mean_step_us": summary.step_time,
                "mean_copying_us_per_step": summary.copy_time,
                "gain_percent": _number(summary.gain),
                "gain_percent_with_copying": _number(summary.net_gain),
                "copies_experts": summary.copies,
                "refreshes": summary.refreshes,
                "break_even_steps": _number(summary.break_even),
                "memory_bytes_per_rank": summary.memory,
                "extra_memory_bytes_per_rank": summary.extra_memory,
            }
            for summary in summaries
        ],
    }


def _number(value: float) -> float | None:
    """JSON has neither infinity (never) nor a number that does not exist."""
    return value if math.isfinite(value) else None


def _table(summaries: tuple[Summary, ...]) -> Table:
    """What fits 80 columns; everything else is on the page."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("policy", overflow="fold", min_width=20)
    for head in ("mean\nPAR", "worst\nPAR", "gain with\ncopying", "copies\nexperts", "break-even\nsteps"):
        table.add_column(head, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            Text(shortened(summary.name, 60)),
            quantities.par(summary.mean_par),
            quantities.par(summary.worst_par),
            quantities.percent(summary.net_gain),
            quantities.count(summary.copies),
            quantities.steps(summary.break_even),
        )
    return table
