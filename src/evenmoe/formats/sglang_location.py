"""SGLang's --init-expert-location: {"physical_to_logical_map": (L, P)} as .json or .pt; or the word `trivial`.

Every hidden layer has a row, and nothing says which are dense. In the row of a dense layer evenmoe writes slot i →
expert i mod E; a server that has rebalanced saves there whatever it computed. Layers of multi-token prediction have no
row. `trivial` stands for as many MoE layers as it is told.
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.hidden_layers import slots_with_dense
from evenmoe.formats.layer_numbers import DENSE_ROWS, HIDDEN_LAYERS, is_trivial
from evenmoe.formats.rows import slot_rows
from evenmoe.formats.values import slots_of
from evenmoe.io.json_text import json_bytes
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement


def matches(document: Document) -> bool:
    return document.value == "trivial" if document.container == "text" else _MAP in document.fields


_MAP = "physical_to_logical_map"


def read(document: Document, options: Options) -> RawMap:
    if document.container == "text":
        return _trivial(document, options)
    if _MAP not in document.fields:
        raise document.refuse("without `physical_to_logical_map`", "must hold it", "see sglang-logical-count for loads")
    slots = slot_rows(document, document.fields[_MAP], f"`{_MAP}`")
    raw = RawMap(slots, layer_ids=tuple(range(len(slots))), metadata={DENSE_ROWS: True, HIDDEN_LAYERS: len(slots)})
    dense = 0
    while dense < len(slots) and is_trivial(slots[dense]):
        dense += 1
    if 0 < dense < len(slots) and options.first_layer is None:
        raw.notes.append(
            f"the first {dense} layers have the trivial map, as dense layers do: "
            f"convert --first-layer {dense} drops them"
        )
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
    slots_of(value, options)
    slots = slots_with_dense(value, options)
    return torch_bytes({_MAP: slots.astype(np.int64)}) if options.container == "pt" else json_bytes({_MAP: slots})


def _trivial(document: Document, options: Options) -> RawMap:
    layers, experts = options.num_layers, options.num_experts
    if layers is None or experts is None:
        raise document.refuse(
            "the word `trivial`", "must come with sizes", "pass num_layers and num_experts (--num-layers, --experts)"
        )
    slots = options.num_slots or experts
    if layers * slots > 1 << 26:
        raise document.refuse(f"{layers} layers of {slots} slots", "must have at most 2**26 slots", "check the sizes")
    row = np.arange(slots, dtype=np.int64) % experts
    return RawMap([row] * layers, num_experts=experts)
