"""Megatron-Core's recorder: mcore_ep_loads_rank<r>_<time>.npz, what one rank's own tokens chose, forward by forward.

`loads` int32 (layers, forwards, E), `layer_numbers` (layers,), which Megatron counts from 1, and `forward_counts`
(layers,), how many forwards of each layer are filled in: the rest is whatever the memory held. `ep_group_ranks` are the
ranks that share the experts. In a folder the ranks of a forward are summed, those of several groups too, each of which
may have other layers (pipeline parallelism) or the same (data parallelism). Each forward is a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, IntArray, Load, RawLoad, ReadOptions
from evenmoe.formats.document import (
    Document,
    documents_of,
    files_in,
    one_rank_alone,
    parse_document,
    ranks_summed,
    read_bytes,
)

_LOADS, _LAYERS, _FORWARDS = "loads", "layer_numbers", "forward_counts"


@dataclass(frozen=True)
class _Dump:
    """One rank's file: counts (forwards, E) by Megatron's layer number, and the group of ranks that it belongs to."""

    file: str
    rank: int | None
    group: tuple[int, ...]
    by_layer: dict[int, Load]


def _matches(document: Document) -> bool:
    if document.container == "folder":
        files = files_in(document.value, ".npz")
        return bool(files) and _matches(parse_document(str(files[0]), read_bytes(files[0])))
    return isinstance(document.value, Mapping) and {_LOADS, _LAYERS, _FORWARDS} <= set(document.value)


def _read(document: Document, options: ReadOptions) -> RawLoad:
    notes: list[str] = []
    dumps = [_dump(file) for file in documents_of(document, ".npz", notes)]
    _check_once(document, dumps)
    layers = sorted({layer for dump in dumps for layer in dump.by_layer})
    widths = {load.shape[1] for dump in dumps for load in dump.by_layer.values()}
    if len(widths) > 1:
        raise document.error(
            f"a folder with dumps of {min(widths)} and of {max(widths)} experts",
            "must hold dumps of one model",
            "put each model's dumps into a folder of their own",
        )
    # A forward counts where all ranks have it.
    filled = {n: min(len(d.by_layer[n]) for d in dumps if n in d.by_layer) for n in layers}
    if not max(filled.values()):
        raise document.error("without a forward", "must hold recorded counts", "record some traffic first")
    load = np.zeros((max(filled.values()), len(layers), widths.pop()), np.int64)
    for row, number in enumerate(layers):
        for dump in dumps:
            if number in dump.by_layer:
                load[: filled[number], row] += dump.by_layer[number][: filled[number]]
    document.check_total(load, "its counts over all ranks")
    first = min(1, layers[0])
    raw = RawLoad(load, tuple(number - first for number in layers), notes=notes)
    if first:
        raw.notes.append("numbered the layers from 0, where Megatron counts from 1")
    if len(set(filled.values())) > 1:
        raw.notes.append(f"layers have {min(filled.values())} to {max(filled.values())} forwards: the rest are empty")
    dropped = sum(len(load) - filled[number] for dump in dumps for number, load in dump.by_layer.items())
    if dropped:
        raw.notes.append("left out forwards that not all ranks recorded")
    ranks = sorted(dump.rank for dump in dumps if dump.rank is not None)
    if len(dumps) == 1:
        raw.notes.append(one_rank_alone(dumps[0].rank))
        return raw
    raw.notes.append(ranks_summed(ranks, "forwards"))
    groups = {dump.group for dump in dumps if dump.group}
    if len(groups) > 1:
        raw.notes.append(f"summed {len(groups)} expert-parallel groups")
    missing = sorted(set().union(*groups) - set(ranks)) if ranks else []
    if missing:
        text = f"{len(ranks)} ranks without rank {missing[0]}"
        rule, fix = "should have a file of every rank of a group", "add it"
        raw.findings.append(Finding("error", "missing-rank", text, rule, fix, rank=missing[0]))
    return raw


def _dump(file: Document) -> _Dump:
    if not _matches(file) or file.container != "npz":
        raise file.error(
            f"a {file.container} file", f"must be an .npz of `{_LOADS}`, `{_LAYERS}` and `{_FORWARDS}`", "record again"
        )
    arrays = file.value
    loads = file.numbers(arrays[_LOADS], f"`{_LOADS}`", (3,), integers=True)
    numbers = file.numbers(arrays[_LAYERS], f"`{_LAYERS}`", (1,), integers=True)
    counts = file.numbers(arrays[_FORWARDS], f"`{_FORWARDS}`", (1,), integers=True)
    if len(numbers) != len(loads) or len(counts) != len(loads):
        raise file.error(
            f"with {len(numbers)} `{_LAYERS}` and {len(counts)} `{_FORWARDS}` for {len(loads)} layers",
            "must have one of each for a layer",
            "record again",
        )
    if numbers.min() < 0 or numbers.max() >= 1 << 16 or len(set(numbers.tolist())) < len(numbers):
        raise file.error(
            f"with `{_LAYERS}` {numbers.tolist()[:8]}", "must be distinct, from 0 to 65535", "record again"
        )
    if counts.min() < 0 or counts.max() > loads.shape[1]:
        raise file.error(
            f"with `{_FORWARDS}` from {counts.min()} to {counts.max()}",
            f"must be 0 to {loads.shape[1]}, the forwards of `{_LOADS}`",
            "record again",
        )
    by_layer = {number: loads[row, : counts[row]] for row, number in enumerate(numbers.tolist())}
    group: IntArray = np.empty(0, np.int64)
    if "ep_group_ranks" in arrays:
        group = file.numbers(arrays["ep_group_ranks"], "`ep_group_ranks`", (1,), integers=True)
    return _Dump(file.name, _number(file, "global_rank"), tuple(group.tolist()), by_layer)


def _number(file: Document, name: str) -> int | None:
    if name not in file.value:
        return None
    return int(file.numbers(file.value[name], f"`{name}`", (0,), integers=True))


def _check_once(document: Document, dumps: list[_Dump]) -> None:
    seen: dict[int, str] = {}
    for dump in dumps:
        if dump.rank is None:
            continue
        before = seen.setdefault(dump.rank, dump.file)
        if before != dump.file:
            raise document.error(
                f"a folder with rank {dump.rank} twice, in {Path(before).name} and {Path(dump.file).name}",
                "must hold one recording of each rank",
                "put every recording into a folder of its own",
            )


LOAD = Format(ENTRIES["megatron-load"], _matches, _read, model_layers=True)
