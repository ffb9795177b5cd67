"""vLLM #41141 before safetensors: JSON lines, one record of type `eplb_load_stats` a window.

A record has `expert_load` (L, P), tokens per slot, and `p2l_map` (L, P); a record `eplb_load_meta` may come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.physical import to_logical

_STATS, _META = "eplb_load_stats", "eplb_load_meta"


def matches(document: Document) -> bool:
    return any(_kind(record) == _STATS for record in _records(document))


def read(document: Document, options: Options) -> RawLoad:
    windows: list[Load] = []
    metadata: dict[str, Any] = {}
    for line, record in enumerate(_records(document), start=1):
        kind = _kind(record)
        if kind == _META and isinstance(record.get("model"), str):
            metadata["model"] = record["model"]
        if kind not in (_STATS, _META):
            raise document.refuse(f"with record {line} of type {kind[:40]!r}", f"must hold {_STATS}", "drop it")
        if kind == _STATS:
            windows.append(_window(document, record, line, options))
    if not windows:
        raise document.refuse("without a record of loads", f"must hold {_STATS}", "record some traffic first")
    if any(window.shape != windows[0].shape for window in windows):
        raise document.refuse("with windows of different shapes", "must keep one", "pass num_experts (--experts)")
    return RawLoad(np.stack(windows), has_own_map=True, metadata=metadata)


def write(value: Load, options: WriteOptions) -> bytes:
    layers, experts = value.shape[1:]
    slots = np.tile(np.arange(experts), (layers, 1)).tolist()
    records: list[dict[str, Any]] = []
    if "model" in options.metadata:
        records.append({"record_type": _META, "version": 1, "model": options.metadata["model"]})
    for step, window in enumerate(value):
        stats = {"record_type": _STATS, "version": 1, "step": step, "num_ranks": 1}
        records.append({**stats, "expert_load": window.tolist(), "p2l_map": slots})
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _records(document: Document) -> list[Any]:
    return document.value if isinstance(document.value, list) else [document.value]


def _kind(record: Any) -> str:
    kind = record.get("record_type") if isinstance(record, Mapping) else None
    return kind if isinstance(kind, str) else ""


def _window(document: Document, record: Mapping[str, Any], line: int, options: Options) -> Load:
    load = document.numbers(record.get("expert_load"), f"`expert_load` of record {line}", (2,))
    slots = document.numbers(record.get("p2l_map"), f"`p2l_map` of record {line}", (2,), integers=True)
    return to_logical(document, load[None], slots, options.num_experts)[0]
