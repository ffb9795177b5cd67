"""The EPLB table of Ascend's operators: integers (L, E, F), or (E, F) for one layer.

Row e is [count, slot ids…, don't care], 1 ≤ count ≤ F - 1; position i of the ids is replica i of the rank rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evenmoe.formats.arrays_output import array_bytes, arrays_bytes
from evenmoe.formats.contents import IntArray, Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding
from evenmoe.placement import Placement


def matches(document: Document) -> bool:
    value = document.value
    if isinstance(value, Mapping):
        # Other formats name their tensors, and a small map under such a name may look like a table.
        named = all("table" in str(name) or str(name)[-1:].isdigit() for name in value)
        return named and 0 < len(value) <= 1000 and all(fits(value[name]) for name in value)
    if isinstance(value, list):
        return bool(value) and all(fits(layer) for layer in value)
    return fits(value)


def fits(value: Any) -> bool:
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


def read(document: Document, options: Options) -> RawMap:
    raw = RawMap([], replica_index=[])
    for layer, table in enumerate(_layers(document)):
        slots, order = _one_layer(document, table, layer, raw.findings)
        raw.slots.append(slots)
        assert raw.replica_index is not None
        raw.replica_index.append(order)
        if raw.num_experts is None:
            raw.num_experts = len(table)
        if len(table) != raw.num_experts:
            raise document.refuse(
                f"with {len(table)} experts in layer {layer}, {raw.num_experts} in the first",
                "must have as many in every layer",
                "write it again",
            )
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
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
        raise document.refuse(
            f"with count {counts[wrong[0]]} for expert {wrong[0]} in layer {layer}",
            f"must count 1 to {width - 1} slots, the width of its rows less one",
            "write it again",
        )
    total = int(counts.sum())
    slots, order = np.full(total, -1, np.int64), np.zeros(total, np.int64)
    expert, position = np.nonzero(np.arange(width - 1) < counts[:, None])
    ids = table[expert, 1 + position]
    for where in np.flatnonzero((ids < 0) | (ids >= total))[:1]:
        raise document.refuse(
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
