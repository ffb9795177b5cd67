"""SGLang's recorder in modes per_pass and per_token: {"records": [...], "last_physical_to_logical_map": (L, P)}.

A per_pass record has `global_physical_count` (L, P); a per_token record `topk_ids_of_layer` (L, tokens, 8), slots, -1
where a model picks fewer than the 8 that the recorder's code fixes. Either counts the tokens of the record's own
`rank` alone, in spite of the name, and every rank writes files of its own: in a folder of them, the ranks of a
`forward_pass_id` are summed. Each pass is a window. A rank may have several files, each with the map of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evenmoe.formats.contents import IntArray, Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.hidden_layers import load_with_dense, without_dense
from evenmoe.formats.physical import to_logical
from evenmoe.formats.rank_files import alone, documents_of, files_in, missing_ranks, summed
from evenmoe.formats.source import parse_document, read_bytes
from evenmoe.formats.values import smallest_counts, whole_counts
from evenmoe.io.torch_file import torch_bytes

_MAP, _PASS, _TOKENS = "last_physical_to_logical_map", "global_physical_count", "topk_ids_of_layer"
_RECORDED_K = 8  # fixed in the recorder


@dataclass(frozen=True)
class _Record:
    """One pass of one rank: `counts` (L, E) per logical expert; `rank` is None where the record does not say it."""

    forward_pass: int
    rank: int | None
    counts: Load
    file: str


def matches(document: Document) -> bool:
    if document.container == "folder":
        files = files_in(document.value, ".pt")
        return bool(files) and _has_records(parse_document(str(files[0]), read_bytes(files[0])))
    return _has_records(document)


def read(document: Document, options: Options) -> RawLoad:
    notes: list[str] = []
    records = [
        record
        for file in documents_of(document, ".pt", notes)
        for record in _records_of(file, options.num_experts, notes)
    ]
    by_pass = _by_pass(document, records)
    ranks = sorted({record.rank for record in records if record.rank is not None})
    load = np.stack([np.sum([record.counts for record in by_pass[number]], axis=0) for number in sorted(by_pass)])
    if load.dtype.kind == "i":
        document.check_total(load, "its counts over all ranks")
    raw = without_dense(document, load)
    raw.has_own_map = True
    raw.notes += notes
    if len({(record.rank, record.file if record.rank is None else "") for record in records}) == 1:
        raw.notes.append(alone(ranks[0] if ranks else None))
        return raw
    raw.notes.append(summed(ranks, "passes"))
    raw.findings.extend(missing_ranks(ranks))
    raw.findings.extend(_incomplete(by_pass, ranks))
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    counts = smallest_counts(load_with_dense(whole_counts(value, "sglang-detail"), options), options)
    layers, experts = counts.shape[1:]
    records = [
        {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", _PASS: window}
        for number, window in enumerate(counts)
    ]
    return torch_bytes({"records": records, _MAP: np.tile(np.arange(experts, dtype=np.int64), (layers, 1))})


def _has_records(document: Document) -> bool:
    return {"records", _MAP} <= set(document.fields)


def _records_of(document: Document, num_experts: int | None, notes: list[str]) -> list[_Record]:
    """The records of one file."""
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
    logical = to_logical(document, windows, slots, num_experts)
    if len(kept) < len(records):
        notes.append(f"left out {len(records) - len(kept)} records of other gatherers than `primary`")
    if _TOKENS in kept[0][1]:
        text = f"counted at most {_RECORDED_K} experts a token, as many as the recorder keeps"
        notes.extend([] if text in notes else [text])
    return [
        _Record(
            _number(document, record, "forward_pass_id", i, f"records[{i}]"),
            _number(document, record, "rank", None, f"records[{i}]"),
            counts,
            document.name,
        )
        for (i, record), counts in zip(kept, logical, strict=True)
    ]


def _number(document: Document, record: Mapping[str, Any], key: str, missing: Any, where: str) -> Any:
    value = record.get(key)
    return missing if value is None else document.integer(value, f"{where}.{key}")


def _by_pass(document: Document, records: list[_Record]) -> dict[int, list[_Record]]:
    """The records of every pass, each of another rank and all of one shape."""
    shape = records[0].counts.shape
    found: dict[int, dict[object, _Record]] = {}
    for record in records:
        if record.counts.shape != shape:
            sizes = [f"{layers} layers of {experts} experts" for layers, experts in (shape, record.counts.shape)]
            raise document.refuse(
                f"a folder with {sizes[0]} in {Path(records[0].file).name} and {sizes[1]} in {Path(record.file).name}",
                "must hold dumps of one model",
                "put each model's dumps into a folder of their own",
            )
        ranks = found.setdefault(record.forward_pass, {})
        before = ranks.setdefault(record.file if record.rank is None else record.rank, record)
        if before is not record:
            files = sorted({Path(before.file).name, Path(record.file).name})
            rank = "one rank" if record.rank is None else f"rank {record.rank}"
            raise document.refuse(
                f"a recording with pass {record.forward_pass} of {rank} twice, in {' and '.join(files)}",
                "must hold each pass of a rank once",
                "put every recording into a folder of its own",
            )
    return {number: list(ranks.values()) for number, ranks in found.items()}


def _incomplete(by_pass: dict[int, list[_Record]], ranks: list[int]) -> list[Finding]:
    """A warning where some passes lack a rank that others have."""
    short = {number: set(ranks) - {r.rank for r in by_pass[number]} for number in sorted(by_pass)}
    short = {number: absent for number, absent in short.items() if absent}
    if not short:
        return []
    number, absent = next(iter(short.items()))
    text = f"{len(short)} of {len(by_pass)} passes that not all ranks recorded: pass {number} has no rank {min(absent)}"
    rule, fix = "should have every pass of every rank", "start and stop the recording of all ranks together"
    return [Finding("warning", "incomplete-pass", text, rule, fix, rank=min(absent))]


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
    value = record.get(_TOKENS)
    layers, width = slots.shape
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == layers and not value.shape[1]:
        return np.zeros(slots.shape, np.int64)  # a rank that had no token in this pass
    ids = document.numbers(value, f"{where}.{_TOKENS}", (3,), integers=True)
    if len(ids) != layers or ids.min() < -1 or ids.max() >= width:
        raise document.refuse(
            f"with {where}.{_TOKENS} of shape {ids.shape}, slots {ids.min()} to {ids.max()}",
            f"must have {layers} layers and slots -1 to {width - 1}",
            "record again",
        )
    return np.stack([np.bincount(layer[layer >= 0], minlength=width) for layer in ids])


def _bytes(records: list[tuple[int, Mapping[str, Any]]]) -> int:
    return sum(value.nbytes for _, record in records for value in record.values() if isinstance(value, np.ndarray))
