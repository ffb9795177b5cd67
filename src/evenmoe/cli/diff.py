"""`evenmoe diff`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import (
    PlacementFileOptions,
    make_command,
    numbers_of,
    print_json,
    print_notes,
    table_console,
)

if TYPE_CHECKING:
    from evenmoe.formats.difference import Difference

_RANKS_SHOWN = 16  # of a layer in text; --json has them all


@dataclass(frozen=True, kw_only=True)
class DiffCommand(PlacementFileOptions):
    """Count what it takes to move from one placement to another: copies per layer and rank, bytes to move.

    A copy is an expert that a rank must receive because it did not hold it before. The options hold for both files, and
    what one file does not say is taken from the other. The worlds may differ: rank r is the same rank in both.
    Exit codes: 0 done, whether they differ or not; 2 a file or an option is wrong.
    """

    # What of a placement has these names is no option.
    words: ClassVar = {
        "placement": "AFTER",
        "dead_ranks": "--dead",
        **{name: name for name in ("layers", "num_layers", "num_experts")},
    }

    before: Annotated[str, Argument(help="Placement in use: file, `-`, inline JSON, or `trivial`.")]
    after: Annotated[str, Argument(help="Placement to move to, in any format.")]
    expert_bytes: Annotated[
        int | None, Option(help="Bytes of one expert's weights in one layer, for the bytes to move.", min=0)
    ] = None
    ranks_after: Annotated[int | None, Option(help="Ranks of AFTER, where it has others and does not say.", min=1)] = (
        None
    )
    dead: Annotated[
        str | None, Option(help="Ranks whose weights are lost, so that nothing is copied from them: 3,7 or 8-15.")
    ] = None
    ranks_per_node: Annotated[
        int, Option(help="Ranks in a row on a node: an expert is copied from the same node where one holds it.", min=1)
    ] = 8

    def run(self) -> int:
        """Print the copies, layer by layer and rank by rank."""
        from evenmoe.formats.difference import common_layers, diff, read_pair

        first, second = read_pair(self.before, self.after, self.read_options(), self.ranks_after)
        previous, placement, common, left_out = common_layers(first, second)
        change = diff(
            previous,
            placement,
            expert_bytes=self.expert_bytes,
            ranks_per_node=self.ranks_per_node,
            dead_ranks=numbers_of("--dead", self.dead),
        )
        layers = list(common or range(len(change.copies)))
        if self.json:
            print_json({"before": self.before, "after": self.after, "layer_ids": layers, **_summary(change, layers)})
        else:
            print(f"{self.before} -> {self.after}: a copy is an expert that a rank must receive")
            _print_difference(change, layers)
            print_notes([*first.notes, *second.notes, *left_out])
        return 0


def _summary(change: Difference, layers: Sequence[int]) -> dict[str, object]:
    moved = change.bytes_to_move
    return {
        "copies": int(change.copies.sum()),
        "copies_per_layer_and_rank": change.copies.tolist(),
        "experts_with_other_replica_count_per_layer": change.replicas_changed.tolist(),
        "slots_changed_per_layer": None if (change.slots_changed < 0).any() else change.slots_changed.tolist(),
        "expert_bytes": change.expert_bytes,
        "bytes_to_move": None if moved is None else int(moved.sum()),
        "bytes_to_move_per_rank": None if moved is None else moved.sum(axis=0).tolist(),
        "moves": [
            {"layer": layers[layer], "expert": expert, "from_rank": None if source < 0 else source, "to_rank": target}
            for layer, expert, source, target in change.moves.tolist()
        ],
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
        print("sent by rank: " + " ".join(str(count) for count in change.sent))
    lost = int((change.moves[:, 2] < 0).sum())
    if lost:
        print(f"{lost} of them are held by no live rank: load their weights from the checkpoint")


command = make_command("diff", DiffCommand)
