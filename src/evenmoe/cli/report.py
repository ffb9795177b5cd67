"""`evenmoe report`: read a simulation, write the page, say what is in it."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from textwrap import fill

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError
from evenmoe.quantities import QUANTITIES, count
from evenmoe.report import write_report
from evenmoe.report.markup import shortened
from evenmoe.simulator.result import Summary
from evenmoe.simulator.store import load_simulation

#: Figures that fit 80 columns; everything else is on the page.
_SHOWN = ("mean_par", "worst_par", "net_gain_percent", "copies", "break_even_steps")
_WIDTH = 8  # characters of a column's head


def run_report(source: Path, output: Path, png: Path | None, command: list[str], *, as_json: bool) -> None:
    """Write the page and print its headline; `command` is shown on the page."""
    simulation = load_simulation(source)
    if output.exists() and output.samefile(source):
        raise ConstraintError("--output", output, "must not be the input", "name another file")
    inputs = {str(source): hashlib.sha256(source.read_bytes()).hexdigest()}
    written = write_report(simulation, output, shlex.join(command), inputs, png)
    if as_json:
        files = {
            "page": str(written[0]),
            "page_bytes": written[0].stat().st_size,
            "pictures": [str(path) for path in written[1:]],
            "input_sha256": inputs,
        }
        print_json({**files, **simulation.summary.as_json()})
        return
    Console().print(summary_table(simulation.summary, _SHOWN))
    if simulation.empty_windows:
        print(f"{count(simulation.empty_windows)} empty windows of the trace left out")
    for path in written:
        print(f"{path}  {count(path.stat().st_size)} bytes")


def summary_table(summary: Summary, names: tuple[str, ...]) -> Table:
    """Some figures of all policies, each as it is written on the page."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("Policy", overflow="fold", min_width=20)
    columns = [[Text(shortened(policy.name, 60)) for policy in summary.policies]]
    for name in names:
        shown = summary.shown(name)
        head = "\n".join(fill(text, _WIDTH, break_long_words=False) for text in (QUANTITIES[name].label, shown.unit))
        table.add_column(head, justify="right", no_wrap=True)
        columns.append([Text(text) for text in shown.texts])
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table
