"""TensorRT-LLM's load balancer: YAML or JSON with `num_slots`, `layer_updates_per_iter` and

    initial_global_assignments: {model layer: [num_slots logical ids]}

The keys are the model's own layers (3 to 60 for DeepSeek-V3); num_slots / EP slots in a row belong to a rank. Layers of
multi-token prediction follow the hidden layers (61), and nothing says that they are such.
"""

from __future__ import annotations

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding, number_gaps
from evenmoe.formats.layer_numbers import mtp_numbers
from evenmoe.formats.rows import numbered_rows
from evenmoe.formats.values import slots_of
from evenmoe.io.json_text import json_bytes
from evenmoe.placement import Placement

_LAYERS, _UPDATES = "initial_global_assignments", "layer_updates_per_iter"


def matches(document: Document) -> bool:
    return _LAYERS in document.fields and "record_type" not in document.fields


def read(document: Document, options: Options) -> RawMap:
    rows, _ = numbered_rows(document, document.fields.get(_LAYERS), f"`{_LAYERS}`")
    raw = RawMap(list(rows.values()), layer_ids=tuple(rows))
    stated = document.fields.get("num_slots")
    if stated is not None and document.integer(stated, "`num_slots`") != len(raw.slots[0]):
        text = f"`num_slots` {stated} and {len(raw.slots[0])} slots in layer {min(rows)}"
        finding = Finding("error", "slot-count", text, "should count its slots", "correct it", layer=min(rows))
        raw.findings.append(finding)
    if min(rows) == 0:
        text = "layer 0, which may be a count of MoE layers"
        rule = "should have the model's own layer numbers, 3 to 60 for DeepSeek-V3"
        fix = "leave it for a model without dense layers first"
        raw.findings.append(Finding("warning", "layer-numbering", text, rule, fix, layer=0))
    raw.findings.extend(number_gaps(raw.layer_ids))
    if _UPDATES in document.fields:
        raw.metadata[_UPDATES] = document.integer(document.fields[_UPDATES], f"`{_UPDATES}`")
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
    assert options.layer_ids is not None
    slots = [*slots_of(value, options).tolist(), *(row.tolist() for row in options.mtp_slots)]
    numbers = [*options.layer_ids, *mtp_numbers(options)]
    updates = int(options.metadata.get(_UPDATES, 0))
    if options.container == "json":
        layers = {str(layer): row for layer, row in zip(numbers, slots, strict=True)}
        return json_bytes({"num_slots": value.num_slots, _UPDATES: updates, _LAYERS: layers})
    lines = [f"num_slots: {value.num_slots}", f"{_UPDATES}: {updates}", f"{_LAYERS}:"]
    lines += [f"  {layer}: {row}" for layer, row in zip(numbers, slots, strict=True)]
    return ("\n".join(lines) + "\n").encode()
