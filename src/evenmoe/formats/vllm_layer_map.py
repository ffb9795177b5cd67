"""vLLM #53022: a JSON object from MoE layer to its P logical experts; #41141's mapping record holds the same inside."""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.rows import layer_number, numbered_rows
from evenmoe.formats.values import slots_of
from evenmoe.io.json_text import json_bytes
from evenmoe.placement import Placement

_RECORD, _INSIDE = "eplb_initial_mapping", "initial_global_assignments"


def matches(document: Document) -> bool:
    fields = document.fields
    if document.says("record_type", _RECORD):
        return True
    return bool(fields) and all(
        layer_number(key) is not None and isinstance(row, np.ndarray) and row.ndim == 1 for key, row in fields.items()
    )


def read(document: Document, options: Options) -> RawMap:
    record = document.says("record_type", _RECORD)
    rows, named = numbered_rows(document, document.fields.get(_INSIDE) if record else document.value, "its layers")
    raw = RawMap(list(rows.values()))
    if named:  # names like model.layers.3.mlp.experts carry the model's own numbers
        raw.layer_ids = tuple(rows)
    elif list(rows) != list(range(len(rows))):
        text = f"layers {min(rows)} to {max(rows)}, {len(rows)} of them"
        rule = "must count MoE layers from 0 without gaps"
        fix = "renumber them, or name them model.layers.<number> if these are the model's own numbers"
        raw.findings.append(Finding("error", "layer-numbering", text, rule, fix, layer=min(rows), fatal=True))
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
    return json_bytes({str(layer): row for layer, row in enumerate(slots_of(value, options))})
