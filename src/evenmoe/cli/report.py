"""`evenmoe report`."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from evenmoe.cli.options import Command, make_command, out_option
from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    from rich.table import Table

    from evenmoe.report.summary import Summary


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Command):
    """Show what a simulation found: one HTML page and, with --png, its pictures.

    The page needs nothing beside itself: no script, no network, and the same input gives the same bytes. Exit codes: 0
    written; 2 INPUT is no simulation, or a file cannot be read or written.
    """

    short_help: ClassVar = "Show what a simulation found, as one HTML page."

    simulation: Annotated[Path, typer.Argument(metavar="INPUT", help="The file that `evenmoe simulate --out` wrote.")]
    out: Annotated[Path, out_option("The HTML page; a file there is replaced.")] = Path("report.html")
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the pictures as PNGs.")] = None

    def run(self) -> int:
        """Write the page and print its headline."""
        from rich.console import Console

        from evenmoe.report import quantities, write_report
        from evenmoe.report.summary import best_policy, summarise
        from evenmoe.simulator.store import load_simulation

        simulation = load_simulation(self.simulation)
        if self.out.exists() and self.out.samefile(self.simulation):
            raise ConstraintError("--out", self.out, "must not be the input", "name another file")
        digests = {str(self.simulation): hashlib.sha256(self.simulation.read_bytes()).hexdigest()}
        called = shlex.join(["evenmoe", *sys.argv[1:]])
        written = write_report(simulation, self.out, called, digests, self.png)
        summaries = summarise(simulation)
        if self.json:
            found = {
                "page": str(written[0]),
                "pictures": [str(path) for path in written[1:]],
                "page_bytes": written[0].stat().st_size,
                "input_sha256": digests,
                "best_policy": summaries[best_policy(simulation)].name,
                "policies": [_policy(summary) for summary in summaries],
                "empty_windows": simulation.empty_windows,
            }
            print_json(found)
            return 0
        Console().print(_table(summaries))
        if simulation.empty_windows:
            print(f"{quantities.count(simulation.empty_windows)} empty windows of the trace left out")
        for path in written:
            print(f"{path}  {quantities.count(path.stat().st_size)} bytes")
        return 0


def _policy(summary: Summary) -> dict[str, object]:
    return {
        "name": summary.name,
        "mean_par": summary.mean_par,
        "worst_par": summary.worst_par,
        "mean_step_us": summary.step_time,
        "mean_copying_us_per_step": summary.copy_time,
        "gain_percent": summary.gain,
        "gain_percent_with_copying": summary.net_gain,
        "copies_experts": summary.copies,
        "refreshes": summary.refreshes,
        "break_even_steps": summary.break_even,
        "memory_bytes_per_rank": summary.memory,
        "extra_memory_bytes_per_rank": summary.extra_memory,
    }


def _table(summaries: tuple[Summary, ...]) -> Table:
    """What fits 80 columns; everything else is on the page."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from evenmoe.report import quantities
    from evenmoe.report.markup import shortened

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


command = make_command("report", ReportCommand)
