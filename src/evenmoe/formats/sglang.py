"""SGLang: what --init-expert-location takes, and its recorder's sums; every hidden layer is a row.

{"physical_to_logical_map": (L, P)} as .json or .pt, or the word `trivial`. Nothing says which layers are dense. In the
row of a dense layer evenmoe writes slot i → expert i mod E; a server that has rebalanced saves there whatever it
computed. Layers of multi-token prediction have no row. `trivial` stands for as many MoE layers as it is told.

{"logical_count": (L, E) or (T, L, E)} are loads, of a dense layer zeros; with "rank" and
"average_utilization_rate_over_window" beside it, of the recorder in mode stat, summed over ranks already.
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import (
    DENSE_ROWS,
    HIDDEN_LAYERS,
    is_trivial,
    load_with_dense,
    slots_with_dense,
    without_dense,
)
from evenmoe.formats.values import named_bytes, slot_rows, slots_of, smallest_counts, whole_counts
from evenmoe.placement import Placement

_MAP = "physical_to_logical_map"
_COUNT = "logical_count"
_UTILIZATION = "average_utilization_rate_over_window"


def _is_trivial(document: Document) -> bool:
    return isinstance(document.value, str) and document.value == "trivial"


def _matches_location(document: Document) -> bool:
    if document.container == "text":
        return _is_trivial(document)
    return _MAP in document.fields and "expert_load_pass" not in document.fields  # vLLM's payload has a map, too


def _read_location(document: Document, options: ReadOptions) -> RawPlacement:
    if _is_trivial(document):
        return _trivial(document, options)
    if _MAP not in document.fields:
        raise document.error(f"without `{_MAP}`", "must hold it", "see sglang-logical-count for loads")
    slots = slot_rows(document, document.fields[_MAP], f"`{_MAP}`")
    raw = RawPlacement(
        slots, layer_ids=tuple(range(len(slots))), metadata={DENSE_ROWS: True, HIDDEN_LAYERS: len(slots)}
    )
    dense = 0
    while dense < len(slots) and is_trivial(slots[dense]):
        dense += 1
    if 0 < dense < len(slots) and options.first_layer is None:
        raw.notes.append(
            f"the first {dense} layers have the trivial map, as dense layers do: "
            f"convert --first-layer {dense} drops them"
        )
    return raw


def _write_location(value: Placement, options: WriteOptions) -> bytes:
    slots_of(value, options)
    slots = slots_with_dense(value, options)
    return named_bytes({_MAP: slots.astype(np.int64)}, options.container)


def _trivial(document: Document, options: ReadOptions) -> RawPlacement:
    layers, experts = options.num_layers, options.num_experts
    if layers is None or experts is None:
        raise document.error(
            "the word `trivial`", "must come with sizes", "pass num_layers and num_experts (--num-layers, --experts)"
        )
    slots = options.num_slots or experts
    if layers * slots > 1 << 26:
        raise document.error(f"{layers} layers of {slots} slots", "must have at most 2**26 slots", "check the sizes")
    row = np.arange(slots, dtype=np.int64) % experts
    return RawPlacement([row] * layers, num_experts=experts)


def _matches_logical_count(document: Document) -> bool:
    fields = document.fields
    return _COUNT in fields and _MAP not in fields and "rank" not in fields


def _read_logical_count(document: Document, options: ReadOptions) -> RawLoad:
    load = document.numbers(document.fields.get(_COUNT), f"`{_COUNT}`", (2, 3))
    return without_dense(document, load[None] if load.ndim == 2 else load)


def _write_logical_count(value: Load, options: WriteOptions) -> bytes:
    return named_bytes({_COUNT: load_with_dense(value, options)}, options.container)


def _matches_stat(document: Document) -> bool:
    return {"rank", _COUNT} <= set(document.fields)


def _read_stat(document: Document, options: ReadOptions) -> RawLoad:
    load = document.numbers(document.fields.get(_COUNT), f"`{_COUNT}`", (3,))
    raw = without_dense(document, load)
    rate = document.fields.get(_UTILIZATION)
    if isinstance(rate, float):
        raw.metadata[_UTILIZATION] = rate
    return raw


def _write_stat(value: Load, options: WriteOptions) -> bytes:
    counts = smallest_counts(whole_counts(value, "sglang-stat"), options)
    rate = options.metadata.get(_UTILIZATION)
    return named_bytes({"rank": 0, _COUNT: load_with_dense(counts, options), _UTILIZATION: rate}, "pt")


LOCATION = Format(
    ENTRIES["sglang-location"], _matches_location, _read_location, _write_location, model_layers=True, dense_rows=True
)
LOGICAL_COUNT = Format(
    ENTRIES["sglang-logical-count"],
    _matches_logical_count,
    _read_logical_count,
    _write_logical_count,
    model_layers=True,
    kept_metadata=(HIDDEN_LAYERS,),
)
STAT = Format(
    ENTRIES["sglang-stat"],
    _matches_stat,
    _read_stat,
    _write_stat,
    model_layers=True,
    kept_metadata=(HIDDEN_LAYERS, _UTILIZATION),
)
