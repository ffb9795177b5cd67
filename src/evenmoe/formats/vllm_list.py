"""vLLM #49572: a JSON list of P logical experts for all layers, or a list of them for each MoE layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.rows import slot_rows
from evenmoe.formats.values import slots_of
from evenmoe.io.json_text import json_bytes
from evenmoe.placement import Placement


def matches(document: Document) -> bool:
    return fits(document.value) is not None


def fits(value: Any) -> bool | None:
    """True for rows that place every expert, False for rows that might be slots with experts missing, None for neither.

    An id can be no larger than the slots are many, and loads of real traffic are.
    """
    rows = [value] if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(rows, (list, np.ndarray)) or not len(rows):
        return None
    if isinstance(rows, np.ndarray) and rows.ndim != 2:
        return None
    whole, last_experts = True, set()
    for row in rows:
        if not isinstance(row, np.ndarray) or row.ndim != 1 or row.dtype.kind != "i" or not row.size:
            return None
        if row.min() < -1 or row.max() >= len(row):
            return None
        different = len(np.unique(row))
        if 2 * different < len(row):  # counts of little traffic: a placement has few replicas of most experts
            return None
        whole = whole and row.min() == 0 and different == row.max() + 1
        last_experts.add(int(row.max()))
    return whole and len(last_experts) == 1 and last_experts != {0}


def read(document: Document, options: Options) -> RawMap:
    value = document.value
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        return RawMap(slot_rows(document, value, "its list"))
    row = document.numbers(value, "its list", (1,), integers=True)
    layers = options.num_layers or 1
    if layers > 1 << 16:
        raise document.refuse(f"read for {layers} layers", "must have at most 65536", "check --num-layers")
    raw = RawMap([row] * layers)
    raw.notes.append(f"one list for all layers, taken for {layers} (--num-layers)")
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
    return json_bytes(slots_of(value, options))
