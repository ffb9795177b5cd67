"""`evenmoe check`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from evenmoe.cli.options import (
    PlacementFileOptions,
    find_engine,
    for_option,
    make_command,
    print_json,
    print_notes,
    sizes_text,
    table_console,
)
from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    from evenmoe.formats.reading import Checked

_SHOWN = 100  # findings in text; --json has them all


@dataclass(frozen=True, kw_only=True)
class CheckCommand(PlacementFileOptions):
    """Find what is wrong with a placement or a load of any tool: each finding names layer, rank and slot.

    Missing experts, duplicate replicas on one rank, layers that are numbered wrongly, slots that do not divide, ranks
    of different sizes, replicas that the rank rule never reaches, counts that are negative or too large, layers without
    tokens; with --for, a file that the engine does not read, and replicas that its own rule never reaches. Exits with 0
    if there is nothing but warnings, 1 if there is an error, 2 if the file cannot be read at all.
    """

    for_: Annotated[
        str | None,
        for_option("What matters for an engine: whether it reads the file, and which replicas stay idle there"),
    ] = None
    file: Annotated[str, Argument(help="File, folder, `-` for standard input, or inline JSON.")]

    def run(self) -> int:
        """Print every finding."""
        from evenmoe.formats.reading import check

        engine, options = find_engine(self.for_), self.read_options()
        if engine is not None and self.file == "-":
            raise ConstraintError("--for", self.for_, "must come with a file, not standard input", "name the file")
        found = check(self.file, options)
        if engine is not None:
            from evenmoe.engines.findings import check_for_engine

            found = check_for_engine(engine, self.file, options, found)
        errors = sum(finding.severity == "error" for finding in found.findings)
        if self.json:
            print_json(
                {
                    "source": self.file,
                    "format": found.format,
                    "engine": None if engine is None else engine.name,
                    **found.summary,
                    "clean": found.clean,
                    "errors": errors,
                    "warnings": len(found.findings) - errors,
                    "findings": [dataclasses.asdict(finding) for finding in found.findings],
                    "notes": list(found.notes),
                }
            )
        else:
            _print_findings(self.file, found, errors)
            if engine is not None:
                print(f"for {engine.version} (replicas: {engine.choice})")
            print_notes(found.notes)
        return 0 if found.clean else 1


def _print_findings(source: str, found: Checked, errors: int) -> None:
    print(f"{source}: {found.format}, {sizes_text(found.summary)}")
    if not found.findings:
        print("nothing wrong")
        return
    from rich.table import Table

    table = Table("", "rule", "layer", "rank", "slot", "found")
    for column in table.columns[2:5]:
        column.justify = "right"
    for finding in found.findings[:_SHOWN]:
        place = ("" if value is None else str(value) for value in (finding.layer, finding.rank, finding.slot))
        table.add_row(finding.severity, finding.kind, *place, finding.text)
    table_console(sys.stdout).print(table, highlight=False, markup=False)
    advice = {finding.kind: f"{finding.kind}: it {finding.rule}; {finding.fix}" for finding in found.findings}
    for line in advice.values():
        print(line)
    if len(found.findings) > _SHOWN:
        print(f"{len(found.findings) - _SHOWN} more; --json lists them")
    print(f"{errors} errors, {len(found.findings) - errors} warnings")


command = make_command("check", CheckCommand)
