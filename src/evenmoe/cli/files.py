"""What `convert`, `check` and `diff` do and print."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from evenmoe.cli.streams import print_json
from evenmoe.formats.checking import Checked
from evenmoe.formats.checking import check as check_file
from evenmoe.formats.contents import Contents, Options
from evenmoe.formats.converting import convert as convert_file
from evenmoe.formats.difference import Difference
from evenmoe.formats.difference import diff as compare
from evenmoe.formats.layer_numbers import common_layers
from evenmoe.formats.reading import read_placement

_SHOWN = 100  # findings in text; --json has them all
_RANKS_SHOWN = 16  # of a layer in text; --json has them all


def run_convert(
    source: str,
    target: str,
    to: str,
    format: str | None,
    layers: str | None,
    first_layer: int | None,
    map_: Path | None,
    *,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Convert, and say what was read, written, dropped and assumed."""
    options = Options(**_read_map(map_, sizes), **sizes)
    done = convert_file(source, target, to, format=format, layers=layers, first_layer=first_layer, options=options)
    out = sys.stderr if target == "-" else sys.stdout
    if as_json:
        summary = {
            "source": source,
            "target": target,
            "from": done.contents.format,
            "to": done.format,
            "kind": done.contents.kind,
            **_sizes(done.contents),
            "notes": list(done.notes),
        }
        print_json(summary, out)
        return
    print(
        f"{source} ({done.contents.format}: {_sizes_text(_sizes(done.contents))}) -> {target} ({done.format})", file=out
    )
    _print_notes(done.notes)


def run_check(
    source: str, format: str | None, layers: str | None, map_: Path | None, *, as_json: bool, **sizes: Any
) -> bool:
    """Print every finding; whether there was no error."""
    found = check_file(source, format=format, layers=layers, **_read_map(map_, sizes), **sizes)
    errors = sum(finding.severity == "error" for finding in found.findings)
    if as_json:
        summary: dict[str, Any] = {
            "file": source,
            "format": found.format,
            **found.summary,
            "clean": found.clean,
            "errors": errors,
            "warnings": len(found.findings) - errors,
            "findings": [dataclasses.asdict(finding) for finding in found.findings],
            "notes": list(found.notes),
        }
        print_json(summary)
        return found.clean
    _print_findings(source, found, errors)
    _print_notes(found.notes)
    return found.clean


def run_diff(
    before: str, after: str, expert_bytes: int | None, layers: str | None, *, as_json: bool, **sizes: Any
) -> None:
    """Print the copies, layer by layer and rank by rank."""
    first = read_placement(before, Options(**sizes), layers)
    second = read_placement(after, Options(**sizes), layers)
    previous, placement, common, left_out = common_layers(first, second)
    change = compare(previous, placement, expert_bytes=expert_bytes)
    numbers = list(common or range(len(change.copies)))
    if as_json:
        print_json(_diff_summary(before, after, change, numbers))
        return
    _print_diff(before, after, change, numbers)
    _print_notes([*first.notes, *second.notes, *left_out])


def read_map(path: Path, num_experts: int | None, num_ranks: int | None = None) -> dict[str, Any]:
    """The placement of the slots that a load counts, and its layers, as `Options` and `read` take them.

    Which ranks have the slots does not matter; `num_ranks` is for maps that do not say it, and held against the others.
    """
    sizes = Options(num_ranks=num_ranks, num_experts=num_experts)
    found = read_placement(path, sizes, argument="--map", ranks_matter=False)
    return {"placement": found.placement, "placement_layers": found.layer_ids}


def _read_map(path: Path | None, sizes: dict[str, Any]) -> dict[str, Any]:
    return {} if path is None else read_map(path, sizes["num_experts"], sizes["num_ranks"])


def _sizes(contents: Contents) -> dict[str, int]:
    if contents.kind == "load":
        assert contents.load is not None
        windows, layers, experts = contents.load.shape
        sizes = {"num_windows": windows, "num_layers": layers, "num_experts": experts}
        return {**sizes, "num_empty_windows": contents.empty_windows}
    assert contents.placement is not None
    placement = contents.placement
    return {
        "num_layers": placement.num_layers,
        "num_slots": placement.num_slots,
        "num_experts": placement.num_experts,
    }


def _sizes_text(sizes: dict[str, int]) -> str:
    shown = {name: value for name, value in sizes.items() if value or name != "num_empty_windows"}
    return ", ".join(f"{value} {name.removeprefix('num_').replace('_', ' ')}" for name, value in shown.items())


def _print_findings(source: str, found: Checked, errors: int) -> None:
    print(f"{source}: {found.format}, {_sizes_text(found.summary)}")
    if not found.findings:
        print("nothing wrong")
        return
    table = Table("", "rule", "layer", "rank", "slot", "found")
    for column in table.columns[2:5]:
        column.justify = "right"
    for finding in found.findings[:_SHOWN]:
        place = ("" if value is None else str(value) for value in (finding.layer, finding.rank, finding.slot))
        table.add_row(finding.severity, finding.kind, *place, finding.text)
    _console().print(table, highlight=False, markup=False)
    advice = {finding.kind: f"{finding.kind}: it {finding.rule}; {finding.fix}" for finding in found.findings}
    for line in advice.values():
        print(line)
    if len(found.findings) > _SHOWN:
        print(f"{len(found.findings) - _SHOWN} more; --json lists them")
    print(f"{errors} errors, {len(found.findings) - errors} warnings")


def _diff_summary(before: str, after: str, change: Difference, numbers: list[int]) -> dict[str, Any]:
    moved = change.bytes_to_move
    return {
        "before": before,
        "after": after,
        "layers": numbers,
        "copies": int(change.copies.sum()),
        "copies_per_layer_and_rank": change.copies.tolist(),
        "experts_with_other_replica_count_per_layer": change.replicas_changed.tolist(),
        "slots_changed_per_layer": None if (change.slots_changed < 0).any() else change.slots_changed.tolist(),
        "expert_bytes": change.expert_bytes,
        "bytes_to_move": None if moved is None else int(moved.sum()),
        "bytes_to_move_per_rank": None if moved is None else moved.sum(axis=0).tolist(),
    }


def _print_diff(before: str, after: str, change: Difference, numbers: list[int]) -> None:
    print(f"{before} -> {after}: a copy is an expert that a rank must receive")
    narrow = change.copies.shape[1] <= _RANKS_SHOWN
    onto = "copies on ranks 0, 1, …" if narrow else "most on a rank"
    table = Table("layer", "copies", onto, "experts with other replica count", "slots changed")
    moved = change.bytes_to_move
    if moved is not None:
        table.add_column("MB to move")
    for column in table.columns:
        column.justify = "right"
    rows = [row for row in range(len(numbers)) if change.copies[row].any() or change.slots_changed[row]]
    for row in rows:
        busiest = int(np.argmax(change.copies[row]))
        cells = [
            str(numbers[row]),
            str(change.copies[row].sum()),
            " ".join(map(str, change.copies[row])) if narrow else f"{change.copies[row, busiest]} (rank {busiest})",
            str(change.replicas_changed[row]),
            "-" if change.slots_changed[row] < 0 else str(change.slots_changed[row]),
        ]
        table.add_row(*cells, *([] if moved is None else [f"{moved[row].sum() / 1e6:,.1f}"]))
    if rows:
        _console().print(table, highlight=False)
    by_rank = change.copies.sum(axis=0)
    total = f"{change.copies.sum()} copies in {int(change.copies.any(axis=1).sum())} of {len(numbers)} layers"
    if moved is not None:
        total += f", {moved.sum() / 1e9:,.3f} GB to move"
    print(total)
    if by_rank.any():
        print("copies per rank: " + " ".join(str(count) for count in by_rank))


def _console() -> Console:
    """A terminal's width on a terminal; elsewhere enough that a finding stays on one line."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _print_notes(notes: list[str] | tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
