"""`evenmoe report`."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import (
    Command,
    check_no_stream,
    completed,
    find_engine,
    for_option,
    make_command,
    out_option,
    print_json,
)
from evenmoe.errors import ConstraintError
from evenmoe.report.look import FORMATS, WIDTH, Look

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evenmoe.simulator.result import Summary

#: Figures that fit 80 columns; everything else is on the page.
_SHOWN = ("mean_par", "worst_par", "net_gain_percent", "copies", "break_even_steps")
_MARK = "*"  # of a policy that the engine cannot run
_WIDTH = 8  # characters of a column's head


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Command):
    """Show what a simulation found: one HTML page and, with --figures, its pictures.

    The page needs nothing beside itself: no script, no network, and the same input gives the same bytes. Exit codes: 0
    written; 2 INPUT is no simulation, or a file cannot be read or written.
    """

    words: ClassVar = {name: f"--figure-{name}" for name in ("format", "width", "height", "style")}

    simulation: Annotated[Path, Argument(metavar="INPUT", help="The file that `evenmoe simulate --out` wrote.")]
    out: Annotated[Path, out_option("The HTML page; a file there is replaced.")] = Path("report.html")
    for_: Annotated[
        str | None, for_option("Look at it for an engine: which policies it can run, and the best of them")
    ] = None
    figures: Annotated[Path | None, Option(metavar="DIR", help="Also write the pictures, one file each.")] = None
    figure_format: Annotated[
        str | None, Option(help="png, svg or pdf. Default: png.", autocompletion=completed(FORMATS))
    ] = None
    figure_width: Annotated[float | None, Option(help=f"Inches. Default: {WIDTH:g}.")] = None
    figure_height: Annotated[float | None, Option(help="Inches. Default: what suits each picture.")] = None
    figure_style: Annotated[str | None, Option(help="A style of matplotlib, by its name or its .mplstyle file.")] = None

    def run(self) -> int:
        """Write the page and print its headline."""
        from rich.console import Console

        from evenmoe.quantities import count
        from evenmoe.report import write_report
        from evenmoe.simulator.store import load_simulation

        look, engine = self._look(), find_engine(self.for_)
        check_no_stream("--out", self.out)
        check_no_stream("--figures", self.figures)
        simulation = load_simulation(self.simulation)
        simulation = simulation if engine is None else simulation.seen_for(engine)
        if self.out.exists() and self.out.samefile(self.simulation):
            raise ConstraintError("--out", self.out, "must not be the input", "name another file")
        inputs = {str(self.simulation): hashlib.sha256(self.simulation.read_bytes()).hexdigest()}
        called = shlex.join(["evenmoe", *sys.argv[1:]])
        written = write_report(simulation, self.out, called, inputs, self.figures, look)
        if self.json:
            files = {
                "page": str(written[0]),
                "page_bytes": written[0].stat().st_size,
                "figures": [str(path) for path in written[1:]],
                "input_sha256": inputs,
            }
            print_json({**files, **simulation.summary.as_json()})
            return 0
        console = Console()
        print_headline(simulation.summary, console)
        console.print(summary_table(simulation.summary, _SHOWN))
        print_unable(simulation.summary, console)
        if simulation.empty_windows:
            print(f"{count(simulation.empty_windows)} empty windows of the trace left out")
        for path in written:
            print(f"{path}  {count(path.stat().st_size)} bytes")
        return 0

    def _look(self) -> Look:
        given = {name: getattr(self, f"figure_{name}") for name in self.words}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if self.figures is None:
                raise ConstraintError(
                    f"--figure-{name}", value, "must come with --figures", "name the folder for the pictures"
                )
        return Look(**given)


def print_headline(summary: Summary, console: Console) -> None:
    """Print the headline, what goes with it, and what it was measured on."""
    headline = summary.headline
    console.print(headline.sentence, style="bold", markup=False, highlight=False)
    for text in (*headline.details, headline.measured_on):
        console.print(text, markup=False, highlight=False)
    console.print()


def print_unable(summary: Summary, console: Console) -> None:
    """Print which of the marked policies the engine cannot run, and why."""
    unable = [f"{policy.name} ({policy.cannot_run})" for policy in summary.policies if policy.cannot_run]
    if summary.engine is not None and unable:
        text = f"{_MARK} {summary.engine.name} cannot run {'; '.join(unable)}"
        console.print(text, markup=False, highlight=False)


def summary_table(summary: Summary, figures: tuple[str, ...]) -> Table:
    """Some figures of all policies, each as it is written on the page; those that the engine cannot run are marked."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from evenmoe.quantities import QUANTITIES
    from evenmoe.report.markup import shortened

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("Policy", overflow="fold", min_width=20)
    marks = [f" {_MARK}" if policy.cannot_run else "" for policy in summary.policies]
    names = [shortened(policy.name, 60) for policy in summary.policies]
    columns = [[Text(f"{name}{mark}") for name, mark in zip(names, marks, strict=True)]]
    for key in figures:
        shown = summary.shown(key)
        head = "\n".join(fill(text, _WIDTH, break_long_words=False) for text in (QUANTITIES[key].label, shown.unit))
        table.add_column(head, justify="right", no_wrap=True)
        columns.append([Text(text) for text in shown.texts])
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table


command = make_command("report", ReportCommand)
