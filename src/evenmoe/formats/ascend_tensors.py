"""Ascend's tensors: slot maps, EPLB tables and loads, which only their numbers tell apart.

vLLM's expert map (#14544, .pth) and vllm-ascend's global map: (L, D, E), the expert's slot within the rank, or -1.
#14544 makes the last axis as long as the slots, so columns beyond the experts are -1 on every rank.

The EPLB table of Ascend's operators: integers (L, E, F), or (E, F) for one layer. Row e is [count, slot ids…, don't
care], 1 ≤ count ≤ F - 1; position i of the ids is replica i of the rank rule.

Loads of vllm-ascend: a tensor (L, E); per slot (L, D, P/D); or (T, L, D, P/D) for T stages. Counts per slot mean
nothing without the placement under which they were counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, IntArray, Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.omni import is_pattern
from evenmoe.formats.values import array_bytes, arrays_bytes, one_window, slots_by_rank
from evenmoe.io import Value
from evenmoe.placement import Placement

_OF_TOKENS = (
    np.uint8,
    np.int16,
    np.uint16,
)  # in which vLLM keeps the experts of tokens; no recorder of loads counts so


def _matches_slot_map(document: Document) -> bool:
    return _is_slot_map(document.value)


def _is_slot_map(value: object) -> bool:
    """Whether an array looks like such a map: no load has -1."""
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 3
        and value.dtype.kind == "i"
        and value.size > 0
        and int(value.min()) == -1
        and not (value.dtype == np.int16 and bool(((value < 0).all(axis=2) == (value < 0).any(axis=2)).all()))
    )


def _read_slot_map(document: Document, options: ReadOptions) -> RawPlacement:
    table = document.numbers(document.value, "its tensor", (3,), integers=True)
    layers, ranks, width = table.shape
    if table.min() < -1 or table.max() >= width:
        raise document.error(
            f"with slots {table.min()} to {table.max()}", f"must hold -1, or slots 0 to {width - 1}", "write it again"
        )
    held = np.flatnonzero((table >= 0).any(axis=(0, 1)))
    experts = options.num_experts or (int(held[-1]) + 1 if len(held) else 1)
    per_rank = int(table.max()) + 1
    raw = RawPlacement([], [[per_rank] * ranks] * layers, num_experts=experts)
    if not per_rank:
        raise document.error("with -1 alone", "must place every expert", "write it again")
    for layer, rows in enumerate(table):
        slots = np.full((ranks, per_rank), -1, np.int64)
        rank, expert = np.nonzero(rows >= 0)
        slots[rank, rows[rank, expert]] = expert
        raw.slots.append(slots.reshape(-1))
        raw.findings.extend(_conflicts(rows, rank, expert, slots, layer))
    if experts < width:
        raw.notes.append(f"took {experts} experts for all: the last {width - experts} columns are -1 everywhere")
    return raw


def _write_slot_map(value: Placement, options: WriteOptions) -> bytes:
    slots = slots_by_rank(value, "slot-map", options)
    table = np.full((value.num_layers, value.num_ranks, value.num_experts), -1, np.int32)
    layer, rank, position = np.indices(slots.shape)
    table[layer, rank, slots] = position
    return array_bytes(table, options.container)


def _conflicts(rows, rank, expert, slots, layer: int) -> list[Finding]:
    found = []
    for r, e in zip(rank.tolist(), expert.tolist(), strict=True):
        slot, kept = int(rows[r, e]), int(slots[r, rows[r, e]])
        if kept != e:
            text = f"experts {e} and {kept} in slot {slot} of rank {r} in layer {layer}"
            found.append(
                Finding(
                    "error",
                    "slot-conflict",
                    text,
                    "must have one expert in a slot",
                    "write it again",
                    layer=layer,
                    rank=r,
                    slot=slot,
                    expert=e,
                    fatal=True,
                )
            )
    return found


def _matches_eplb_table(document: Document) -> bool:
    value = document.value
    if isinstance(value, Mapping):
        # Other formats name their tensors, and a small map under such a name may look like a table.
        named = all("table" in str(name) or str(name)[-1:].isdigit() for name in value)
        return named and 0 < len(value) <= 1000 and all(_is_table(value[name]) for name in value)
    if isinstance(value, list):
        return bool(value) and all(_is_table(layer) for layer in value)
    return _is_table(value)


def _is_table(value: Value) -> bool:
    """Whether an array looks like a table: counts within its width, ids within its slots."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim not in (2, 3) or not value.size:
        return False
    tables = value[None] if value.ndim == 2 else value
    width = tables.shape[2]
    counts = tables[:, :, 0]
    if width < 2 or counts.min() < 1 or counts.max() >= width:
        return False
    used = np.arange(width - 1) < counts[:, :, None]
    ids = tables[:, :, 1:]
    return bool((~used | ((ids >= 0) & (ids < counts.sum(axis=1)[:, None, None]))).all())


def _read_eplb_table(document: Document, options: ReadOptions) -> RawPlacement:
    raw = RawPlacement([], replica_index=[])
    for layer, table in enumerate(_layers(document)):
        slots, order = _one_layer(document, table, layer, raw.findings)
        raw.slots.append(slots)
        assert raw.replica_index is not None
        raw.replica_index.append(order)
        if raw.num_experts is None:
            raw.num_experts = len(table)
        if len(table) != raw.num_experts:
            raise document.error(
                f"with {len(table)} experts in layer {layer}, {raw.num_experts} in the first",
                "must have as many in every layer",
                "write it again",
            )
    return raw


def _write_eplb_table(value: Placement, options: WriteOptions) -> bytes:
    tables = np.stack([value.eplb_array(layer) for layer in range(value.num_layers)])
    if options.container == "npz":
        return arrays_bytes({"eplb_table": tables}, "npz")
    return array_bytes(tables, options.container)


def _layers(document: Document) -> list[IntArray]:
    value = document.value
    if isinstance(value, Mapping):
        named = sorted(value, key=lambda name: (len(str(name)), str(name)))  # layer_2 before layer_10
        value = [value[name] for name in named]
        value = value[0] if len(value) == 1 else value
    if isinstance(value, list):
        return [document.numbers(layer, f"table {i}", (2,), integers=True) for i, layer in enumerate(value)]
    tables = document.numbers(value, "its table", (2, 3), integers=True)
    return [tables] if tables.ndim == 2 else list(tables)


def _one_layer(document: Document, table: IntArray, layer: int, findings: list[Finding]) -> tuple[IntArray, IntArray]:
    width, counts = table.shape[1], table[:, 0]
    wrong = np.flatnonzero((counts < 1) | (counts >= width))
    if len(wrong):
        raise document.error(
            f"with count {counts[wrong[0]]} for expert {wrong[0]} in layer {layer}",
            f"must count 1 to {width - 1} slots, the width of its rows less one",
            "write it again",
        )
    total = int(counts.sum())
    slots, order = np.full(total, -1, np.int64), np.zeros(total, np.int64)
    expert, position = np.nonzero(np.arange(width - 1) < counts[:, None])
    ids = table[expert, 1 + position]
    for where in np.flatnonzero((ids < 0) | (ids >= total))[:1]:
        raise document.error(
            f"with slot {ids[where]} for expert {expert[where]} in layer {layer}",
            f"must have slots 0 to {total - 1}, as many as it counts",
            "write it again",
        )
    slots[ids], order[ids] = expert, position
    for where in np.flatnonzero(slots[ids] != expert).tolist():
        slot, first = int(ids[where]), int(expert[where])
        text = f"slot {slot} given to experts {first} and {slots[slot]} in layer {layer}"
        rule = "must give every slot one expert"
        place = {"layer": layer, "slot": slot, "expert": first}
        findings.append(Finding("error", "slot-conflict", text, rule, "correct the table", fatal=True, **place))
    return slots, order


def _matches_load(document: Document) -> bool:
    value = document.value
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3, 4) or value.dtype.kind not in "iuf":
        return False
    if value.ndim == 3 and (value.dtype in _OF_TOKENS or is_pattern(value)):
        return False
    return not _is_slot_map(value) and not _is_table(value)


def _read_load(document: Document, options: ReadOptions) -> RawLoad:
    counts = document.numbers(document.value, "its tensor", (2, 3, 4))
    if counts.ndim == 2:
        return RawLoad(counts[None])
    if options.placement is None:
        raise document.error(
            f"of shape {counts.shape}, counts per slot",
            "must be read with the placement that was in use",
            "pass placement (--map FILE)",
        )
    counts = counts[None] if counts.ndim == 3 else counts
    return RawLoad(counts.reshape(*counts.shape[:2], -1))


def _write_load(value: Load, options: WriteOptions) -> bytes:
    return array_bytes(one_window(value, options), options.container)


SLOT_MAP = Format(ENTRIES["slot-map"], _matches_slot_map, _read_slot_map, _write_slot_map, stores_ranks=True)
EPLB_TABLE = Format(ENTRIES["eplb-table"], _matches_eplb_table, _read_eplb_table, _write_eplb_table, rank_rule=True)
LOAD = Format(ENTRIES["vllm-ascend-load"], _matches_load, _read_load, _write_load)
