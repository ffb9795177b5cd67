"""What `evenmoe plan` does and prints."""

from __future__ import annotations

import json
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
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.formats.contents import Contents
from evenmoe.formats.reading import read
from evenmoe.formats.writing import write
from evenmoe.metrics import FloatArray, as_load, peak_over_mean
from evenmoe.placement import identity_placement
from evenmoe.rules.shares import rank_loads

_WORST_SHOWN = 8  # layers in text; --json has them all
_EVEN_RULES = ("even", "token", "occurrence")  # under which replicas share evenly, as `lower_bound` takes them to


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
    previous = _read_previous(order, contents)
    ranks, slots = _sizes(order, previous)
    assert contents.load is not None
    load = as_load(contents.load)
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
    numbers = _layer_numbers(order, contents)
    notes = list(contents.notes)
    if len(windows) < len(load):
        notes.append(f"merged {len(load)} windows into {len(windows)} (--most-windows)")
    if order.out is not None:
        notes += write(
            order.out, placement, format=order.to_format, layer_ids=numbers, metadata=dict(contents.metadata)
        )
    rows = _rows(order, windows, placement, previous)
    bound = None
    if order.rule in _EVEN_RULES:
        bound = em.lower_bound(
            load.sum(axis=0), num_ranks=ranks, num_slots=slots, num_nodes=order.nodes, num_groups=order.groups
        )
    shown = numbers or range(placement.num_layers)
    summary = _summary(order, contents, len(goal), placement, previous, rows, bound, shown)
    out = sys.stderr if order.out == "-" else sys.stdout
    if as_json:
        print(json.dumps({**summary, "notes": notes}), file=out)
        return
    _print(summary, rows, bound, shown, Console(file=out) if out.isatty() else Console(file=out, width=120))
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
    recorded = None
    if order.map is not None:
        recorded = read(order.map, num_ranks=order.ranks, num_experts=order.experts).placement
        if recorded is None:
            raise ConstraintError("--map", order.map, "must be a placement and is a load", "name a placement's file")
    contents = read(
        order.source,
        format=order.from_format,
        num_experts=order.experts,
        num_layers=order.num_layers,
        layers=order.layers,
        placement=recorded,
    )
    if contents.load is None:
        raise ConstraintError(
            order.source,
            f"a placement ({contents.format})",
            "must be a load or a trace",
            "name the recorded load; a placement in use goes to --previous",
        )
    return contents


def _read_previous(order: Order, contents: Contents) -> em.Placement | None:
    if order.previous is None:
        return None
    assert contents.load is not None
    found = read(order.previous, num_ranks=order.ranks, num_experts=contents.load.shape[-1])
    if found.placement is None:
        raise ConstraintError("--previous", order.previous, "must be a placement and is a load", "name a placement")
    ours, theirs = contents.layer_ids, found.layer_ids
    if ours is None or theirs is None or ours == theirs:
        return found.placement
    if not set(ours) <= set(theirs):
        raise ConstraintError(
            "--previous",
            f"a placement of the layers {_spans(theirs)}",
            f"must hold the load's layers, {_spans(ours)}",
            "choose the layers of the load with --layers, or the placement of the same model",
        )
    # Dense layers have rows in some formats, and a load may be of some layers only.
    rows = [theirs.index(number) for number in ours]
    whole = found.placement
    return em.Placement(
        whole.slot_to_expert[rows],
        whole.num_ranks,
        num_experts=whole.num_experts,
        replica_index=whole.replica_index[rows],
    )


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


def _layer_numbers(order: Order, contents: Contents) -> tuple[int, ...] | None:
    assert contents.load is not None
    if order.first_layer is not None:
        if contents.layer_ids is not None and contents.layer_ids[0] != order.first_layer:
            raise ConstraintError(
                "--first-layer",
                order.first_layer,
                f"must be the load's own first layer, {contents.layer_ids[0]}",
                "leave it out: the load numbers its layers",
            )
        if contents.layer_ids is None:
            return tuple(range(order.first_layer, order.first_layer + contents.load.shape[1]))
    return contents.layer_ids


def _rows(order: Order, windows: FloatArray, placement: em.Placement, previous: em.Placement | None) -> list[_Row]:
    """The identity placement, where the experts divide by the ranks; the previous one; the plan."""
    layers, experts = windows.shape[1:]
    compared: list[tuple[str, em.Placement]] = []
    if experts % placement.num_ranks == 0:
        compared.append(("as loaded", identity_placement(layers, experts, placement.num_ranks)))
    if previous is not None:
        compared.append(("previous", previous))
    compared.append(("planned", placement))
    total = windows.sum(axis=0)
    return [
        _Row(
            name,
            each.num_slots,
            peak_over_mean(rank_loads(total, each, order.rule)),
            peak_over_mean(rank_loads(windows, each, order.rule)).mean(axis=0),
        )
        for name, each in compared
    ]


def _summary(
    order: Order,
    contents: Contents,
    num_windows: int,
    placement: em.Placement,
    previous: em.Placement | None,
    rows: list[_Row],
    bound: FloatArray | None,
    numbers: Sequence[int],
) -> dict[str, Any]:
    assert contents.load is not None
    copies = None if previous is None else em.count_copies(previous, placement)
    return {
        "source": order.source,
        "target": order.out,
        "from": contents.format,
        "to": order.to_format if order.out is not None else None,
        "recorded_windows": int(contents.load.shape[0]),
        "planned_windows": num_windows,
        "layers": placement.num_layers,
        "experts": placement.num_experts,
        "ranks": placement.num_ranks,
        "slots": placement.num_slots,
        "nodes": order.nodes,
        "groups": order.groups,
        "rule": order.rule,
        "picks_per_layer": float(contents.load.sum() / placement.num_layers),
        "peak_to_average": {
            row.name.replace(" ", "_"): {
                "all_tokens": _mean_and_worst(row.all_tokens, numbers),
                "mean_of_windows": _mean_and_worst(row.windows, numbers),
            }
            for row in rows
        },
        "peak_to_average_lower_bound_all_tokens": None if bound is None else _mean_and_worst(bound, numbers),
        "replicas_per_expert": {"min": int(placement.num_replicas.min()), "max": int(placement.num_replicas.max())},
        "copies": None if copies is None else int(copies.sum()),
        "copies_per_layer": None if copies is None else copies.tolist(),
        "layer_numbers": list(numbers),
        "peak_to_average_per_layer_mean_of_windows": {
            row.name.replace(" ", "_"): row.windows.round(6).tolist() for row in rows
        },
    }


def _mean_and_worst(values: FloatArray, numbers: Sequence[int]) -> dict[str, Any]:
    worst = int(values.argmax())
    return {
        "mean_of_layers": round(float(values.mean()), 6),
        "worst": round(float(values[worst]), 6),
        "worst_layer": int(numbers[worst]),
    }


def _print(
    summary: dict[str, Any], rows: list[_Row], bound: FloatArray | None, numbers: Sequence[int], console: Console
) -> None:
    console.print(
        f"{summary['source']} ({summary['from']}): {summary['recorded_windows']} windows, {summary['layers']} layers, "
        f"{summary['experts']} experts, {summary['picks_per_layer']:,.0f} picks per layer\n"
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
        cells = [_cell for values in (row.all_tokens, row.windows) for _cell in _cells(values, numbers)]
        table.add_row(row.name, str(row.slots), *cells)
    if bound is not None:
        table.add_row("no placement beats", str(summary["slots"]), *_cells(bound, numbers), "", "")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    planned = rows[-1].windows
    _print_worst(rows, planned, numbers, console)
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


def _cells(values: FloatArray, numbers: Sequence[int]) -> tuple[str, str]:
    worst = int(values.argmax())
    return f"{values.mean():.3f}", f"{values[worst]:.3f} (layer {numbers[worst]})"


def _print_worst(rows: list[_Row], planned: FloatArray, numbers: Sequence[int], console: Console) -> None:
    worst: npt.NDArray[np.intp] = np.argsort(-planned, kind="stable")[:_WORST_SHOWN]
    console.print("layers that stay the most uneven, mean of windows:")
    table = Table("layer", *(row.name for row in rows))
    for column in table.columns:
        column.justify = "right"
    for layer in worst:
        table.add_row(str(numbers[layer]), *(f"{row.windows[layer]:.3f}" for row in rows))
    console.print(table)


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
