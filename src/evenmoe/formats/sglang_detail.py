"""SGLang's recorder in modes per_pass and per_token: {"records": [...], "last_physical_to_logical_map": (L, P)}.

A per_pass record has `global_physical_count` (L, P), summed over ranks; a per_token record `topk_ids_of_layer`
(L, tokens, 8), slots, -1 where a model picks fewer than the 8 that the recorder's code fixes. Each record is a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evenmoe.formats.containers.torch_file import torch_bytes
from evenmoe.formats.contents import IntArray, Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.formats.hidden_layers import load_with_dense, without_dense
from evenmoe.formats.physical import to_logical
from evenmoe.formats.values import smallest_counts, whole_counts

_MAP, _PASS, _TOKENS = "last_physical_to_logical_map", "global_physical_count", "topk_ids_of_layer"
_RECORDED_K = 8  # fixed in the recorder


def matches(document: Document) -> bool:
    return {"records", _MAP} <= set(document.fields)


def read(document: Document, options: Options) -> RawLoad:
    slots = document.numbers(document.fields.get(_MAP), f"`{_MAP}`", (2,), integers=True)
    records = document.fields.get("records")
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise document.refuse("with `records` that are no dictionaries", "must hold a list of them", "record again")
    kept = [(i, record) for i, record in enumerate(records) if str(record.get("gatherer_key", "primary")) == "primary"]
    if not kept:
        raise document.refuse("without a record", "must hold a forward pass", "record some traffic first")
    if len(kept) * slots.size * 8 > 9 * _bytes(kept) + ALLOWANCE_BYTES:
        raise document.refuse(
            f"with {len(kept)} records for {slots.size} slots", "must hold counts in every record", "record again"
        )
    windows = np.stack([_per_slot(document, record, slots, f"records[{i}]") for i, record in kept])
    raw = without_dense(document, to_logical(document, windows, slots, options.num_experts))
    if len(kept) < len(records):
        raw.notes.append(f"left out {len(records) - len(kept)} records of other gatherers than `primary`")
    if _TOKENS in kept[0][1]:
        rank = kept[0][1].get("rank")
        raw.notes.append(f"counted the tokens of rank {rank} alone, at most {_RECORDED_K} experts a token")
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    counts = smallest_counts(load_with_dense(whole_counts(value, "sglang-detail"), options), options)
    layers, experts = counts.shape[1:]
    records = [
        {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", _PASS: window}
        for number, window in enumerate(counts)
    ]
    return torch_bytes({"records": records, _MAP: np.tile(np.arange(experts, dtype=np.int64), (layers, 1))})


def _per_slot(document: Document, record: Mapping[str, Any], slots: IntArray, where: str) -> Load:
    if _PASS in record:
        counts = document.numbers(record[_PASS], f"{where}.{_PASS}", (2,))
        if counts.shape != slots.shape:
            raise document.refuse(
                f"with {where}.{_PASS} of shape {counts.shape}",
                f"must have that of the map, {slots.shape}",
                "record again",
            )
        return counts
    ids = document.numbers(record.get(_TOKENS), f"{where}.{_TOKENS}", (3,), integers=True)
    layers, width = slots.shape
    if len(ids) != layers or ids.min() < -1 or ids.max() >= width:
        raise document.refuse(
            f"with {where}.{_TOKENS} of shape {ids.shape}, slots {ids.min()} to {ids.max()}",
            f"must have {layers} layers and slots -1 to {width - 1}",
            "record again",
        )
    return np.stack([np.bincount(layer[layer >= 0], minlength=width) for layer in ids])


def _bytes(records: list[tuple[int, Mapping[str, Any]]]) -> int:
    return sum(value.nbytes for _, record in records for value in record.values() if isinstance(value, np.ndarray))
