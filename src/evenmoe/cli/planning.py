"""What `evenmoe plan` does and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import evenmoe as em
from evenmoe.cli.files import read_map
from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.formats.contents import Contents, Options
from evenmoe.formats.layer_numbers import MTP_LAYERS, ranges
from evenmoe.formats.reading import read, read_placement
from evenmoe.formats.writing import write
from evenmoe.metrics import FloatArray, as_load, mean_over_windows, peak_over_mean, within_range
from evenmoe.placement import default_placement, layers_of
from evenmoe.rules.catalogue import RULES

_WORST_SHOWN = 8  # layers in text; --json has them all


@dataclass(frozen=True)
class Order:
    """What was asked for: the command's options."""

    source: str
    out: str | None
    ranks: int | None
    slots: int | None
    nodes: int
    groups: int
    rule: str
    mean: bool
    most_windows: int
    previous: Path | None
    max_copies: int | None
    target_par: float | None
    seed: int
    from_format: str | None
    to_format: str
    first_layer: int | None
    layers: str | None
    experts: int | None
    num_layers: int | None
    map: Path | None


@dataclass(frozen=True)
class _Row:
    """Peak-to-average loads of one placement: (L,) of all tokens, and the mean over windows."""

    name: str
    slots: int
    all_tokens: FloatArray
    windows: FloatArray


def run_plan(order: Order, *, as_json: bool) -> None:
    """Read, plan, write, show."""
    _check_target(order)
    contents = _read_load(order)
    previous, notes_on_previous = _read_previous(order, contents)
    ranks, slots = _sizes(order, previous)
    assert contents.load is not None
    load = within_range(as_load(contents.load))
    windows = _merged(load, order.most_windows)
    goal = windows.sum(axis=0, keepdims=True) if order.mean else windows
    console = Console(stderr=True)
    with console.status(f"planning {windows.shape[1]} layers for {len(goal)} windows …"):
        placement = em.plan(
            goal[0] if len(goal) == 1 else goal,
            num_ranks=ranks,
            num_slots=slots,
            num_nodes=order.nodes,
            num_groups=order.groups,
            previous=previous,
            max_copies=order.max_copies,
            target_par=order.target_par,
            rule=order.rule,
            seed=order.seed,
        )
    numbers = contents.layer_ids
    notes = [*contents.notes, *notes_on_previous]
    if contents.trace is not None and contents.trace.routing is not None:
        notes.append("left `routing` unused: a plan is made from loads")
    if len(windows) < len(load):
        notes.append(f"merged {len(load)} windows into {len(windows)} (--most-windows)")
    notes += _gaps(windows, numbers or range(windows.shape[1]))
    if order.out is not None:
        notes += write(
            order.out, placement, format=order.to_format, layer_ids=numbers, metadata=dict(contents.metadata)
        )
    rows = _rows(order, windows, placement, previous)
    bound = None
    if RULES.get(order.rule).shares_evenly:  # as `lower_bound` takes them to
        bound = em.lower_bound(
            load.sum(axis=0), num_ranks=ranks, num_slots=slots, num_nodes=order.nodes, num_groups=order.groups
        )
    shown = numbers or range(placement.num_layers)
    summary = _summary(order, contents, windows, len(goal), placement, previous, rows, bound, shown)
    out = sys.stderr if order.out == "-" else sys.stdout
    if as_json:
        print_json({**summary, "notes": notes}, out)
        return
    console = Console(file=out) if out.isatty() else Console(file=out, width=120)
    _print(summary, rows, bound, shown, _judged(windows), console)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _check_target(order: Order) -> None:
    """Before anything is read: planning may take minutes."""
    with suppress(OSError):  # one of them is no file, or not yet
        if order.out is not None and Path(order.out).samefile(order.source) and Path(order.out).is_file():
            raise ConstraintError("--out", order.out, "must not be the input", "name another file")
    name = order.to_format
    entry = FORMATS.get(name)
    if entry is None or entry.kind != "placement" or not entry.writes:
        fitting = ", ".join(n for n, f in FORMATS.items() if f.kind == "placement" and f.writes)
        raise ConstraintError("--to", repr(name), "must be a format of placements", f"use one of {fitting}")


def _read_load(order: Order) -> Contents:
    contents = read(
        order.source,
        format=order.from_format,
        num_experts=order.experts,
        num_layers=order.num_layers,
        layers=order.layers,
        first_layer=order.first_layer,
        **({} if order.map is None else read_map(order.map, order.experts)),
    )
    if contents.load is None:
        raise ConstraintError(
            order.source,
            f"a placement ({contents.format})",
            "must be a load or a trace",
            "name the recorded load; a placement in use goes to --previous",
        )
    return contents


def _read_previous(order: Order, contents: Contents) -> tuple[em.Placement | None, list[str]]:
    """The placement in use, row by row the load's layers; and what of it is no part of the plan."""
    if order.previous is None:
        return None, []
    assert contents.load is not None
    known = Options(num_ranks=order.ranks, num_experts=contents.load.shape[-1])
    found = read_placement(order.previous, known, argument="--previous")
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


def _sizes(order: Order, previous: em.Placement | None) -> tuple[int, int]:
    if previous is None and (order.ranks is None or order.slots is None):
        name = "--ranks" if order.ranks is None else "--slots"
        raise MissingArgumentError(
            name,
            "not given",
            "must say how large the world is",
            f"pass {name}, or --previous with the placement in use",
        )
    ranks = previous.num_ranks if order.ranks is None and previous is not None else order.ranks
    slots = previous.num_slots if order.slots is None and previous is not None else order.slots
    assert ranks is not None
    assert slots is not None
    return ranks, slots


def _merged(load: FloatArray, most: int) -> FloatArray:
    """At most so many windows, neighbours summed; each of the merged ones covers nearly as many."""
    if len(load) <= most:
        return load
    starts = np.arange(most) * len(load) // most
    return np.add.reduceat(load, starts, axis=0)


def _judged(windows: FloatArray) -> npt.NDArray[np.bool_]:
    """(L,): the layers that enter means, which are those with tokens; all where none has any."""
    judged = np.asarray(windows.any(axis=(0, 2)))
    return judged if judged.any() else np.ones(len(judged), bool)


def _gaps(windows: FloatArray, numbers: Sequence[int]) -> list[str]:
    """Notes on layers without tokens in all windows, or in some."""
    recorded = windows.any(axis=2)
    never = [numbers[row] for row in np.flatnonzero(~recorded.any(axis=0)).tolist()]
    partly = [numbers[row] for row in np.flatnonzero(recorded.any(axis=0) & ~recorded.all(axis=0)).tolist()]
    notes = []
    if never:
        notes.append(f"layers without tokens, placed but left out of the means: {ranges(never)}")
    if partly:
        notes.append(f"layers without tokens in some windows, which do not count for them: {ranges(partly)}")
    return notes


def _rows(order: Order, windows: FloatArray, placement: em.Placement, previous: em.Placement | None) -> list[_Row]:
    """The identity placement, where the experts divide by the ranks; the previous one; the plan."""
    layers, experts = windows.shape[1:]
    compared: list[tuple[str, em.Placement]] = []
    if experts % placement.num_ranks == 0:
        compared.append(("as loaded", default_placement(layers, experts, placement.num_ranks)))
    if previous is not None:
        compared.append(("previous", previous))
    compared.append(("planned", placement))
    total, rule = windows.sum(axis=0), RULES.get(order.rule)
    return [
        _Row(
            name,
            each.num_slots,
            peak_over_mean(rule.rank_loads(total, each)),
            mean_over_windows(peak_over_mean(rule.rank_loads(windows, each)), windows),
        )
        for name, each in compared
    ]


def _summary(
    order: Order,
    contents: Contents,
    windows: FloatArray,
    num_planned: int,
    placement: em.Placement,
    previous: em.Placement | None,
    rows: list[_Row],
    bound: FloatArray | None,
    numbers: Sequence[int],
) -> dict[str, Any]:
    assert contents.load is not None
    judged = _judged(windows)
    with np.errstate(over="ignore"):
        picks = float(contents.load.sum() / judged.sum())
    copies = None if previous is None else em.count_copies(previous, placement)
    return {
        "source": order.source,
        "target": order.out,
        "from": contents.format,
        "to": order.to_format if order.out is not None else None,
        "recorded_windows": int(contents.load.shape[0]),
        "empty_windows": contents.empty_windows,
        "planned_windows": num_planned,
        "layers": placement.num_layers,
        "experts": placement.num_experts,
        "ranks": placement.num_ranks,
        "slots": placement.num_slots,
        "nodes": order.nodes,
        "groups": order.groups,
        "rule": order.rule,
        "picks_per_layer": picks if np.isfinite(picks) else None,
        "peak_to_average": {
            row.name.replace(" ", "_"): {
                "all_tokens": _mean_and_worst(row.all_tokens, numbers, judged),
                "mean_of_windows": _mean_and_worst(row.windows, numbers, judged),
            }
            for row in rows
        },
        "peak_to_average_lower_bound_all_tokens": None if bound is None else _mean_and_worst(bound, numbers, judged),
        "replicas_per_expert": {"min": int(placement.num_replicas.min()), "max": int(placement.num_replicas.max())},
        "copies": None if copies is None else int(copies.sum()),
        "copies_per_layer": None if copies is None else copies.tolist(),
        "layer_numbers": list(numbers),
        "peak_to_average_per_layer_mean_of_windows": {
            row.name.replace(" ", "_"): row.windows.round(6).tolist() for row in rows
        },
    }


def _mean_and_worst(values: FloatArray, numbers: Sequence[int], judged: npt.NDArray[np.bool_]) -> dict[str, Any]:
    worst = int(np.where(judged, values, 0.0).argmax())
    return {
        "mean_of_layers": round(float(values[judged].mean()), 6),
        "worst": round(float(values[worst]), 6),
        "worst_layer": int(numbers[worst]),
    }


def _print(
    summary: dict[str, Any],
    rows: list[_Row],
    bound: FloatArray | None,
    numbers: Sequence[int],
    judged: npt.NDArray[np.bool_],
    console: Console,
) -> None:
    empty = f" ({summary['empty_windows']} empty ones left out)" if summary["empty_windows"] else ""
    picks = summary["picks_per_layer"]
    console.print(
        f"{summary['source']} ({summary['from']}): {summary['recorded_windows']} windows{empty}, "
        f"{summary['layers']} layers, {summary['experts']} experts, "
        f"{'more than 1.8e308' if picks is None else f'{picks:,.0f}' if picks < 1e15 else f'{picks:.3g}'} "
        "picks per layer\n"
        f"{summary['ranks']} ranks, {summary['slots']} slots, rule {summary['rule']}; "
        f"planned on {summary['planned_windows']} {'window' if summary['planned_windows'] == 1 else 'windows'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table(
        "placement",
        "slots",
        "all tokens",
        "worst layer",
        "mean of windows",
        "worst layer",
        title="peak-to-average load (1.0 is perfect), mean of layers",
    )
    for row in rows:
        cells = [_cell for values in (row.all_tokens, row.windows) for _cell in _cells(values, numbers, judged)]
        table.add_row(row.name, str(row.slots), *cells)
    if bound is not None:
        table.add_row("no placement beats", str(summary["slots"]), *_cells(bound, numbers, judged), "", "")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    _print_worst(rows, np.where(judged, rows[-1].windows, 0.0), numbers, int(judged.sum()), console)
    replicas = summary["replicas_per_expert"]
    console.print(f"replicas per expert: {replicas['min']} to {replicas['max']}", highlight=False)
    if summary["copies"] is not None:
        per_layer = summary["copies_per_layer"]
        console.print(
            f"copies from the previous placement: {summary['copies']} ({min(per_layer)} to {max(per_layer)} per layer)",
            highlight=False,
        )
    if summary["target"] not in (None, "-"):
        console.print(f"written: {summary['target']} ({summary['to']})", highlight=False, markup=False, soft_wrap=True)


def _cells(values: FloatArray, numbers: Sequence[int], judged: npt.NDArray[np.bool_]) -> tuple[str, str]:
    found = _mean_and_worst(values, numbers, judged)
    return f"{found['mean_of_layers']:.3f}", f"{found['worst']:.3f} (layer {found['worst_layer']})"


def _print_worst(
    rows: list[_Row], planned: FloatArray, numbers: Sequence[int], num_judged: int, console: Console
) -> None:
    worst: npt.NDArray[np.intp] = np.argsort(-planned, kind="stable")[: min(_WORST_SHOWN, num_judged)]
    console.print("layers that stay the most uneven, mean of windows:")
    table = Table("layer", *(row.name for row in rows))
    for column in table.columns:
        column.justify = "right"
    for layer in worst:
        table.add_row(str(numbers[layer]), *(f"{row.windows[layer]:.3f}" for row in rows))
    console.print(table)
