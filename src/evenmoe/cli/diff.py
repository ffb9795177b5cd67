"""`evenmoe diff`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import PlacementFileOptions, make_command, print_json, print_notes, table_console

if TYPE_CHECKING:
    from evenmoe.formats.contents import Contents, ReadOptions
    from evenmoe.formats.difference import Difference

_RANKS_SHOWN = 16  # of a layer in text; --json has them all


@dataclass(frozen=True, kw_only=True)
class DiffCommand(PlacementFileOptions):
    """Count what it takes to move from one placement to another: copies per layer and rank, bytes to move.

    A copy is an expert that a rank must receive because it did not hold it before. The options hold for both files.
    Exit codes: 0 done, whether they differ or not; 2 a file or an option is wrong.
    """

    # What of a placement has these names is no option.
    words: ClassVar = {"placement": "AFTER", **{name: name for name in ("layers", "num_layers", "num_experts")}}

    before: Annotated[str, Argument(help="Placement in use: file, `-`, inline JSON, or `trivial`.")]
    after: Annotated[str, Argument(help="Placement to move to, in any format.")]
    expert_bytes: Annotated[
        int | None, Option(help="Bytes of one expert's weights in one layer, for the bytes to move.", min=0)
    ] = None

    def run(self) -> int:
        """Print the copies, layer by layer and rank by rank."""
        from evenmoe.formats.difference import common_layers, diff
        from evenmoe.formats.reading import read_placement

        options = self.read_options()
        if "trivial" in (self.before, self.after) and self.before != self.after:
            given = read_placement(self.after if self.before == "trivial" else self.before, options)
            options = _sizes_of(given, options)
        first = read_placement(self.before, options)
        second = read_placement(self.after, options)
        previous, placement, common, left_out = common_layers(first, second)
        change = diff(previous, placement, expert_bytes=self.expert_bytes)
        layers = list(common or range(len(change.copies)))
        if self.json:
            print_json({"before": self.before, "after": self.after, "layer_ids": layers, **_summary(change)})
        else:
            print(f"{self.before} -> {self.after}: a copy is an expert that a rank must receive")
            _print_difference(change, layers)
            print_notes([*first.notes, *second.notes, *left_out])
        return 0


def _sizes_of(contents: Contents, options: ReadOptions) -> ReadOptions:
    """The options for a `trivial` as large as the other placement, where they do not say it."""
    found = contents.placement
    assert found is not None
    known = {name: getattr(found, name) for name in ("num_layers", "num_experts", "num_slots", "num_ranks")}
    known["first_layer"] = None if contents.layer_ids is None else contents.layer_ids[0]
    missing = {name: size for name, size in known.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def _summary(change: Difference) -> dict[str, object]:
    moved = change.bytes_to_move
    return {
        "copies": int(change.copies.sum()),
        "copies_per_layer_and_rank": change.copies.tolist(),
        "experts_with_other_replica_count_per_layer": change.replicas_changed.tolist(),
        "slots_changed_per_layer": None if (change.slots_changed < 0).any() else change.slots_changed.tolist(),
        "expert_bytes": change.expert_bytes,
        "bytes_to_move": None if moved is None else int(moved.sum()),
        "bytes_to_move_per_rank": None if moved is None else moved.sum(axis=0).tolist(),
    }


def _print_difference(change: Difference, layers: Sequence[int]) -> None:
    from rich.table import Table

    copies, moved = change.copies, change.bytes_to_move
    narrow = copies.shape[1] <= _RANKS_SHOWN
    onto = "copies on ranks 0, 1, …" if narrow else "most on a rank"
    table = Table("layer", "copies", onto, "experts with other replica count", "slots changed")
    if moved is not None:
        table.add_column("MB to move")
    for column in table.columns:
        column.justify = "right"
    for row in (row for row in range(len(layers)) if copies[row].any() or change.slots_changed[row]):
        busiest = int(copies[row].argmax())
        cells = [
            str(layers[row]),
            str(copies[row].sum()),
            " ".join(map(str, copies[row])) if narrow else f"{copies[row, busiest]} (rank {busiest})",
            str(change.replicas_changed[row]),
            "-" if change.slots_changed[row] < 0 else str(change.slots_changed[row]),
        ]
        table.add_row(*cells, *([] if moved is None else [f"{moved[row].sum() / 1e6:,.1f}"]))
    if table.rows:
        table_console(sys.stdout).print(table, highlight=False)
    total = f"{copies.sum()} copies in {int(copies.any(axis=1).sum())} of {len(layers)} layers"
    print(total if moved is None else f"{total}, {moved.sum() / 1e9:,.3f} GB to move")
    if copies.any():
        print("copies per rank: " + " ".join(str(count) for count in copies.sum(axis=0)))


command = make_command("diff", DiffCommand)
