"""`evenmoe plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import (
    FileOptions,
    Rule,
    WorldOptions,
    completed,
    find_format,
    make_command,
    out_option,
    print_json,
    print_notes,
    table_console,
)
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.catalogue import ENTRIES
from evenmoe.planner import PLANNERS
from evenmoe.quantities import par
from evenmoe.rules import RULES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console

    from evenmoe.formats.contents import Contents
    from evenmoe.metrics import FloatArray
    from evenmoe.placement import Placement

_PLACEMENT_FORMATS = tuple(name for name, entry in ENTRIES.items() if entry.kind == "placement")
_WORST_SHOWN = 8  # layers in text; --json has them all


@dataclass(frozen=True, kw_only=True)
class PlanCommand(FileOptions, WorldOptions):
    """Plan a placement for a recorded load.

    Reads loads and traces of any tool, writes the placement in any tool's format, and shows how even the ranks are
    before and after: the peak-to-average load (PAR), 1.0 being perfect. With `-` as output the summary goes to standard
    error. Exit codes: 0 done; 2 a file or an option is wrong.
    """

    epilog: ClassVar = "Formats of placements: " + ", ".join(_PLACEMENT_FORMATS)

    source: Annotated[str, Argument(help="Load or trace in any format, a folder, or `-` for standard input.")]
    out: Annotated[str | None, out_option("Placement to write, `-` for standard output. Default: none.")] = None
    ranks: Annotated[
        int | None, Option(help="Expert-parallel ranks. Default of --ranks and --slots: those of --previous.", min=1)
    ] = None
    planner: Annotated[
        str,
        Option(
            "--planner",
            "-p",
            help=f"{', '.join(PLANNERS)}; or py:module:function, or py:file.py:function, called as evenmoe.plan is.",
            autocompletion=completed(PLANNERS),
        ),
    ] = "evenmoe"
    rule: Rule = "even"
    mean: Annotated[
        bool, Option("--mean/--windows", help="Balance the sum of the recording, or its single windows.")
    ] = False
    most_windows: Annotated[int, Option(help="Windows beyond so many are merged with their neighbors.", min=1)] = 64
    previous: Annotated[Path | None, Option(help="Placement in use, in any format: start from it.")] = None
    max_copies: Annotated[int | None, Option(help="At most so many copies per layer.", min=0)] = None
    target_par: Annotated[float | None, Option(help="Stop copying in a layer once it is this even.")] = None
    seed: Annotated[int, Option(help="Of the search's random choices.", min=0)] = 0
    to: Annotated[
        str, Option(help="Format to write.", metavar="FORMAT", autocompletion=completed(_PLACEMENT_FORMATS))
    ] = "evenmoe-placement"

    def run(self) -> int:
        """Read, plan, write, show."""
        from evenmoe.formats.writing import write
        from evenmoe.metrics import as_load, within_range
        from evenmoe.planner.bound import lower_bound
        from evenmoe.planner.options import PlanOptions
        from evenmoe.planner.plan import plan_with

        self._check_target()
        contents = self._read_load()
        previous, notes_on_previous = self._read_previous(contents)
        ranks, slots = self._sizes(previous)
        world = {"num_ranks": ranks, "num_slots": slots, "num_nodes": self.num_nodes(ranks), "num_groups": self.groups}
        assert contents.load is not None
        load = within_range(as_load(contents.load))
        windows = _merged(load, self.most_windows)
        goal = windows.sum(axis=0, keepdims=True) if self.mean else windows
        with table_console(sys.stderr).status(f"planning {windows.shape[1]} layers for {len(goal)} windows …"):
            options = PlanOptions(
                previous=previous,
                max_copies=self.max_copies,
                target_par=self.target_par,
                rule=self.rule,
                seed=self.seed,
                **world,
            )
            placement = plan_with(self.planner, goal[0] if len(goal) == 1 else goal, options)
        numbers = contents.layer_ids or tuple(range(windows.shape[1]))
        notes = [*contents.notes, *notes_on_previous]
        if contents.trace is not None and contents.trace.routing is not None:
            notes.append("left `routing` unused: a plan is made from loads")
        if len(windows) < len(load):
            notes.append(f"merged {len(load)} windows into {len(windows)} (--most-windows)")
        notes += _gaps(windows, numbers)
        if self.out is not None:
            metadata = dict(contents.metadata)
            notes += write(self.out, placement, format=self.to, layer_ids=contents.layer_ids, metadata=metadata)
        bound = lower_bound(load.sum(axis=0), **world) if RULES.get(self.rule).shares_evenly else None
        rows = _compare(windows, placement, previous, self.rule)
        found = _Outcome(self, contents, windows, len(goal), numbers, placement, previous, rows, bound)
        file = sys.stderr if self.out == "-" else sys.stdout
        if self.json:
            print_json({**found.summary(), "notes": notes}, file)
        else:
            found.print_on(table_console(file, width=120))
            print_notes(notes)
        return 0

    def _check_target(self) -> None:
        """Before anything is read: planning may take minutes."""
        with suppress(OSError):  # one of them is no file, or not yet
            if self.out is not None and Path(self.out).samefile(self.source) and Path(self.out).is_file():
                raise ConstraintError("--out", self.out, "must not be the input", "name another file")
        if self.to not in _PLACEMENT_FORMATS and find_format("--to", self.to).kind != "placement":
            fitting = ", ".join(_PLACEMENT_FORMATS)
            raise ConstraintError("--to", repr(self.to), "must be a format of placements", f"use one of {fitting}")

    def _read_load(self) -> Contents:
        from evenmoe.formats.reading import read

        contents = read(self.source, self.read_options())
        if contents.load is None:
            raise ConstraintError(
                self.source,
                f"a placement ({contents.format})",
                "must be a load or a trace",
                "name the recorded load; a placement in use goes to --previous",
            )
        return contents

    def _read_previous(self, contents: Contents) -> tuple[Placement | None, list[str]]:
        """The placement in use, row by row the load's layers; and what of it is no part of the plan."""
        if self.previous is None:
            return None, []
        from evenmoe.formats.contents import ReadOptions
        from evenmoe.formats.layer_numbers import MTP_LAYERS, ranges
        from evenmoe.formats.reading import read_placement
        from evenmoe.placement import layers_of

        assert contents.load is not None
        known = ReadOptions(num_ranks=self.ranks, num_experts=contents.load.shape[-1])
        found = read_placement(self.previous, known, argument="--previous")
        assert found.placement is not None
        notes = ["the MTP layer of --previous is no part of the plan"] if MTP_LAYERS in found.metadata else []
        ours, theirs = contents.layer_ids, found.layer_ids
        if ours is None or theirs is None or ours == theirs:
            return found.placement, notes
        if not set(ours) <= set(theirs):
            raise ConstraintError(
                "--previous",
                f"a placement of the layers {ranges(theirs)}",
                f"must hold the load's layers, {ranges(ours)}",
                "choose the layers of the load with --layers, or the placement of the same model",
            )
        # Dense layers have rows in some formats, and a load may be of some layers only.
        return layers_of(found.placement, [theirs.index(number) for number in ours]), notes

    def _sizes(self, previous: Placement | None) -> tuple[int, int]:
        ranks = self.ranks or (None if previous is None else previous.num_ranks)
        slots = self.slots or (None if previous is None else previous.num_slots)
        if ranks is None or slots is None:
            name = "--ranks" if ranks is None else "--slots"
            raise MissingArgumentError(
                name,
                "not given",
                "must say how large the world is",
                f"pass {name}, or --previous with the placement in use",
            )
        return ranks, slots


@dataclass(frozen=True)
class _Row:
    """Peak-to-average loads of one placement: (L,) of all tokens, and the mean over windows."""

    name: str
    slots: int
    all_tokens: FloatArray
    windows: FloatArray

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_")


@dataclass(frozen=True)
class _Outcome:
    """What is shown of a plan."""

    options: PlanCommand
    contents: Contents
    windows: FloatArray
    num_planned: int
    numbers: Sequence[int]
    placement: Placement
    previous: Placement | None
    rows: list[_Row]
    bound: FloatArray | None

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """(L,): the layers that enter means, which are those with tokens; all where none has any."""
        judged: npt.NDArray[np.bool_] = self.windows.any(axis=(0, 2))  # pyright: ignore[reportAssignmentType]
        return judged if judged.any() else ~judged

    @property
    def assignments(self) -> float:
        """Token–expert assignments per layer, those with tokens; infinite beyond float64."""
        import numpy as np

        assert self.contents.load is not None
        with np.errstate(over="ignore"):
            return float(self.contents.load.sum() / self.judged.sum())

    @property
    def copies(self) -> npt.NDArray[np.int64] | None:
        """(L,): experts that ranks receive, where a placement is in use."""
        from evenmoe.metrics import count_copies

        return None if self.previous is None else count_copies(self.previous, self.placement)

    def summary(self) -> dict[str, object]:
        """The object of --json."""
        options, contents, placement, copies = self.options, self.contents, self.placement, self.copies
        assert contents.load is not None
        return {
            "source": options.source,
            "target": options.out,
            "from": contents.format,
            "to": None if options.out is None else options.to,
            "num_windows": int(contents.load.shape[0]),
            "num_empty_windows": contents.empty_windows,
            "num_planned_windows": self.num_planned,
            "num_layers": placement.num_layers,
            "num_experts": placement.num_experts,
            "num_ranks": placement.num_ranks,
            "num_slots": placement.num_slots,
            "num_nodes": options.num_nodes(placement.num_ranks),
            "num_groups": options.groups,
            "planner": options.planner,
            "rule": options.rule,
            "assignments_per_layer": self.assignments if isfinite(self.assignments) else None,
            "par": {
                row.key: {
                    "all_tokens": self._rounded(row.all_tokens),
                    "mean_of_windows": self._rounded(row.windows),
                }
                for row in self.rows
            },
            "par_lower_bound": None if self.bound is None else self._rounded(self.bound),
            "replicas_per_expert": {"min": int(placement.num_replicas.min()), "max": int(placement.num_replicas.max())},
            "copies": None if copies is None else int(copies.sum()),
            "copies_per_layer": None if copies is None else copies.tolist(),
            "layer_ids": list(self.numbers),
            "par_per_layer": {row.key: row.windows.round(6).tolist() for row in self.rows},
        }

    def print_on(self, console: Console) -> None:
        """Print the same as text."""
        options, contents, placement, copies = self.options, self.contents, self.placement, self.copies
        assert contents.load is not None
        empty = f" ({contents.empty_windows} empty ones left out)" if contents.empty_windows else ""
        by = "" if options.planner == "evenmoe" else f"by {options.planner} "
        count = self.assignments
        shown = "more than 1.8e308" if not isfinite(count) else f"{count:,.0f}" if count < 1e15 else f"{count:.3g}"
        console.print(
            f"{options.source} ({contents.format}): {contents.load.shape[0]} windows{empty}, "
            f"{placement.num_layers} layers, {placement.num_experts} experts, {shown} assignments per layer\n"
            f"{placement.num_ranks} ranks, {placement.num_slots} slots, rule {options.rule}; "
            f"planned {by}on {self.num_planned} {'window' if self.num_planned == 1 else 'windows'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self._print_means(console)
        self._print_worst(console)
        replicas = placement.num_replicas
        console.print(f"replicas per expert: {replicas.min()} to {replicas.max()}", highlight=False)
        if copies is not None:
            console.print(
                f"copies from the previous placement: {copies.sum()} ({copies.min()} to {copies.max()} per layer)",
                highlight=False,
            )
        if options.out not in (None, "-"):
            console.print(f"written: {options.out} ({options.to})", highlight=False, markup=False, soft_wrap=True)

    def _mean_and_worst(self, values: FloatArray) -> tuple[float, float, int]:
        """The mean of the layers with tokens, the worst of them, and its number."""
        worst = int((values * self.judged).argmax())
        return float(values[self.judged].mean()), float(values[worst]), self.numbers[worst]

    def _rounded(self, values: FloatArray) -> dict[str, float]:
        mean, worst, layer = self._mean_and_worst(values)
        return {"mean": round(mean, 6), "worst": round(worst, 6), "worst_layer": layer}

    def _cells(self, values: FloatArray) -> tuple[str, str]:
        mean, worst, layer = self._mean_and_worst(values)
        return par(mean), f"{par(worst)} (layer {layer})"

    def _print_means(self, console: Console) -> None:
        from rich.table import Table

        table = Table(
            *("placement", "slots", "all tokens", "worst layer", "mean of windows", "worst layer"),
            title="peak-to-average load (1.0 is perfect), mean of layers",
        )
        for row in self.rows:
            table.add_row(row.name, str(row.slots), *self._cells(row.all_tokens), *self._cells(row.windows))
        if self.bound is not None:
            table.add_row("no placement beats", str(self.placement.num_slots), *self._cells(self.bound), "", "")
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)

    def _print_worst(self, console: Console) -> None:
        from rich.table import Table

        console.print("layers that stay the most uneven, mean of windows:")
        table = Table("layer", *(row.name for row in self.rows))
        for column in table.columns:
            column.justify = "right"
        planned = self.rows[-1].windows * self.judged
        for layer in (-planned).argsort(kind="stable")[: min(_WORST_SHOWN, self.judged.sum())]:
            table.add_row(str(self.numbers[layer]), *(par(float(row.windows[layer])) for row in self.rows))
        console.print(table)


def _merged(load: FloatArray, most: int) -> FloatArray:
    """At most so many windows, neighbors summed; each of the merged ones covers nearly as many."""
    import numpy as np

    return load if len(load) <= most else np.add.reduceat(load, np.arange(most) * len(load) // most, axis=0)


def _gaps(windows: FloatArray, numbers: Sequence[int]) -> list[str]:
    """Notes on layers without tokens in all windows, or in some."""
    from evenmoe.formats.layer_numbers import ranges

    recorded = windows.any(axis=2).T.tolist()
    never = [number for number, found in zip(numbers, recorded, strict=True) if not any(found)]
    partly = [number for number, found in zip(numbers, recorded, strict=True) if any(found) and not all(found)]
    notes = []
    if never:
        notes.append(f"layers without tokens, placed but left out of the means: {ranges(never)}")
    if partly:
        notes.append(f"layers without tokens in some windows, which do not count for them: {ranges(partly)}")
    return notes


def _compare(windows: FloatArray, placement: Placement, previous: Placement | None, rule: str) -> list[_Row]:
    """The default placement, where the experts divide by the ranks; the previous one; the plan."""
    from evenmoe.metrics import mean_over_windows, peak_over_mean
    from evenmoe.placement import default_placement

    layers, experts = windows.shape[1:]
    compared: list[tuple[str, Placement]] = []
    if experts % placement.num_ranks == 0:
        compared.append(("default placement", default_placement(layers, experts, placement.num_ranks)))
    if previous is not None:
        compared.append(("previous", previous))
    compared.append(("planned", placement))
    total, chosen = windows.sum(axis=0), RULES.get(rule)
    return [
        _Row(
            name,
            each.num_slots,
            peak_over_mean(chosen.rank_loads(total, each)),
            mean_over_windows(peak_over_mean(chosen.rank_loads(windows, each)), windows),
        )
        for name, each in compared
    ]


command = make_command("plan", PlanCommand)
