"""SGLang's recorder, whose ranks write files of their own: of passes or tokens, and in its old version CSV.

Modes per_pass and per_token: {"records": [...], "last_physical_to_logical_map": (L, P)}.
Records have `global_physical_count` (L, P), those of per_token every token's slots besides (`sglang_tokens`). Either
counts the tokens of the record's own `rank` alone, in spite of the name, and every rank writes files of its own: in a
folder of them, the ranks of a `forward_pass_id` are summed. Each pass is a window. A rank may have several files, each
with the map of its time.

The old recorder's CSV has the header layer_id,expert_id,count; layer ids are the model's. Every rank writes files of
its own, expert_distribution_rank<r>_timestamp<t>.csv, of its own tokens, and starts anew after each. In a folder of
them the ranks are summed; the n-th files of all ranks are a window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, IntArray, Load, RawLoad, ReadOptions, WriteOptions
from evenmoe.formats.document import (
    Document,
    documents_of,
    files_in,
    first_line,
    left_out,
    missing_ranks,
    one_rank_alone,
    parse_document,
    rank_in_name,
    ranks_summed,
    read_bytes,
)
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS, load_with_dense, without_dense
from evenmoe.formats.sglang_tokens import Tokens, add_routing, chosen_slots, tokens_of
from evenmoe.formats.values import one_window, smallest_counts, to_logical, whole_counts
from evenmoe.io import ALLOWANCE_BYTES, Value
from evenmoe.io.torch_file import torch_bytes

_HEADER = ["layer_id", "expert_id", "count"]
_TIME = re.compile(r"timestamp_?([0-9]{1,12}(?:\.[0-9]{1,9})?)", re.IGNORECASE)
_MAP, _PASS = "last_physical_to_logical_map", "global_physical_count"


@dataclass(frozen=True)
class _Record:
    """One pass of one rank: `counts` (L, E) per logical expert; `rank` is None where the record does not say it."""

    forward_pass: int
    rank: int | None
    counts: Load
    file: str
    tokens: Tokens | None


def _matches_detail(document: Document) -> bool:
    if document.container == "folder":
        files = files_in(document.value, ".pt")
        return bool(files) and _has_records(parse_document(str(files[0]), read_bytes(files[0])))
    return _has_records(document)


def _read_detail(document: Document, options: ReadOptions) -> RawLoad:
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
    in_order = [record.tokens for number in sorted(by_pass) for record in by_pass[number]]
    add_routing(document, raw, in_order)
    if len({(record.rank, record.file if record.rank is None else "") for record in records}) == 1:
        raw.notes.append(one_rank_alone(ranks[0] if ranks else None))
        return raw
    raw.notes.append(ranks_summed(ranks, "passes"))
    raw.findings.extend(missing_ranks(ranks))
    raw.findings.extend(_incomplete(by_pass, ranks))
    return raw


def _write_detail(value: Load, options: WriteOptions) -> bytes:
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
        raise document.error("with `records` that are no dictionaries", "must hold a list of them", "record again")
    kept = [(i, record) for i, record in enumerate(records) if str(record.get("gatherer_key", "primary")) == "primary"]
    if not kept:
        raise document.error("without a record", "must hold a forward pass", "record some traffic first")
    if len(kept) * slots.size * 8 > 9 * _bytes(kept) + ALLOWANCE_BYTES:
        raise document.error(
            f"with {len(kept)} records for {slots.size} slots", "must hold counts in every record", "record again"
        )
    windows = np.stack([_per_slot(document, record, slots, f"records[{i}]") for i, record in kept])
    logical = to_logical(document, windows, slots, num_experts)
    if len(kept) < len(records):
        notes.append(f"left out {len(records) - len(kept)} records of other gatherers than `primary`")
    return [
        _Record(
            _number(document, record, "forward_pass_id", i, f"records[{i}]"),
            _number(document, record, "rank", None, f"records[{i}]"),
            counts,
            document.name,
            tokens_of(document, record, slots, f"records[{i}]"),
        )
        for (i, record), counts in zip(kept, logical, strict=True)
    ]


def _number(document: Document, record: Mapping[str, Value], key: str, missing: Value, where: str) -> Value:
    value = record.get(key)
    return missing if value is None else document.integer(value, f"{where}.{key}")


def _by_pass(document: Document, records: list[_Record]) -> dict[int, list[_Record]]:
    """The records of every pass, each of another rank and all of one shape."""
    shape = records[0].counts.shape
    found: dict[int, dict[object, _Record]] = {}
    for record in records:
        if record.counts.shape != shape:
            sizes = [f"{layers} layers of {experts} experts" for layers, experts in (shape, record.counts.shape)]
            raise document.error(
                f"a folder with {sizes[0]} in {Path(records[0].file).name} and {sizes[1]} in {Path(record.file).name}",
                "must hold dumps of one model",
                "put each model's dumps into a folder of their own",
            )
        ranks = found.setdefault(record.forward_pass, {})
        before = ranks.setdefault(record.file if record.rank is None else record.rank, record)
        if before is not record:
            files = sorted({Path(before.file).name, Path(record.file).name})
            rank = "one rank" if record.rank is None else f"rank {record.rank}"
            raise document.error(
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


def _per_slot(document: Document, record: Mapping[str, Value], slots: IntArray, where: str) -> Load:
    if _PASS in record:
        counts = document.numbers(record[_PASS], f"{where}.{_PASS}", (2,))
        if counts.shape != slots.shape:
            raise document.error(
                f"with {where}.{_PASS} of shape {counts.shape}",
                f"must have that of the map, {slots.shape}",
                "record again",
            )
        return counts
    ids = chosen_slots(document, record, slots, where)
    return np.stack([np.bincount(layer[layer >= 0], minlength=slots.shape[1]) for layer in ids])


def _bytes(records: list[tuple[int, Mapping[str, Value]]]) -> int:
    return sum(value.nbytes for _, record in records for value in record.values() if isinstance(value, np.ndarray))


def _matches_csv(document: Document) -> bool:
    if document.container == "folder":
        return any(_is_csv(path) for path in files_in(document.value, ".csv"))
    return document.value[0] == _HEADER


def _read_csv(document: Document, options: ReadOptions) -> RawLoad:
    notes: list[str] = []
    if document.container == "folder":
        windows, ranks, several = _csv_folder(document, notes)
    else:
        rank = rank_in_name(document.name)
        windows, ranks, several = [[_lines(document)]], [] if rank is None else [rank], False
    table = np.concatenate([lines for window in windows for lines in window])
    numbers = np.unique(table[:, 0])
    width = max(int(table[:, 1].max()) + 1, options.num_experts or 0)
    if 8 * len(windows) * len(numbers) * width > 8 * table.nbytes // 3 + ALLOWANCE_BYTES:
        raise document.error(
            f"with {len(table)} lines for {len(numbers)} layers of {width} experts",
            "must have a line for most experts",
            "check the expert ids",
        )
    document.check_total(table[:, 2], "its counts")
    load = np.zeros((len(windows), len(numbers), width), np.int64)
    twice = 0
    for window, parts in zip(load, windows, strict=True):
        for layers, experts, counts in (lines.T for lines in parts):
            np.add.at(window, (np.searchsorted(numbers, layers), experts), counts)
            twice += len(layers) - len(np.unique(layers * width + experts))
    raw = without_dense(document, load)
    assert raw.layer_ids is not None
    raw.layer_ids = tuple(int(numbers[row]) for row in raw.layer_ids)
    raw.metadata.clear()  # the lines do not tell the hidden layers
    raw.notes += notes
    if twice:
        raw.notes.append(f"added up {twice} lines that name a layer and an expert again")
    if several:
        raw.notes.append(ranks_summed(ranks, "counts"))
        raw.findings.extend(missing_ranks(ranks))
    else:
        raw.notes.append(one_rank_alone(ranks[0] if ranks else None))
    return raw


def _write_csv(value: Load, options: WriteOptions) -> bytes:
    counts = whole_counts(one_window(value, options), "sglang-csv")
    assert options.layer_ids is not None
    lines = [
        f"{layer},{expert},{count}"
        for layer, row in zip(options.layer_ids, counts.tolist(), strict=True)
        for expert, count in enumerate(row)
    ]
    return ("\n".join([",".join(_HEADER), *lines]) + "\n").encode()


def _is_csv(path: Path) -> bool:
    line = first_line(path, 100).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return [name.strip() for name in line.split(",")] == _HEADER


def _csv_folder(document: Document, notes: list[str]) -> tuple[list[list[np.ndarray]], list[int], bool]:
    """The lines of every rank in every window, the ranks that the names tell, and whether there are several."""
    files = [path for path in files_in(document.value, ".csv") if _is_csv(path)]
    if not files:
        raise document.error(
            f"a folder without a CSV of {','.join(_HEADER)}", "must hold one a rank", "name the recorder's folder"
        )
    notes += left_out(document.value, files)
    by_rank: dict[object, list[tuple[float, str, bytes]]] = {}
    for path in files:
        rank, time = rank_in_name(path.name), _TIME.search(path.name)
        key = path.name if rank is None else rank
        by_rank.setdefault(key, []).append((float(time.group(1)) if time else 0.0, path.name, read_bytes(path)))
    for rank, dumps in by_rank.items():
        dumps.sort()
        _check_once(document, rank, dumps)
    counted = {rank: len(dumps) for rank, dumps in by_rank.items()}
    most = max(counted, key=lambda rank: counted[rank])
    least = min(counted, key=lambda rank: counted[rank])
    if counted[most] != counted[least]:
        raise document.error(
            f"a folder with {counted[most]} files of rank {most} and {counted[least]} of rank {least}",
            "must have as many of every rank",
            "put the files that belong together into a folder of their own",
        )
    windows = [
        [_lines_of(document, name, data) for _, name, data in window] for window in zip(*by_rank.values(), strict=True)
    ]
    if not any(len(lines) for window in windows for lines in window):
        raise document.error("without a single token", "must hold recorded counts", "record some traffic first")
    return windows, sorted(rank for rank in by_rank if isinstance(rank, int)), len(by_rank) > 1


def _check_once(document: Document, rank: object, dumps: list[tuple[float, str, bytes]]) -> None:
    names: dict[bytes, str] = {}
    for _, name, data in dumps:
        before = names.setdefault(data, name)
        if before != name:
            raise document.error(
                f"a folder with the same counts of rank {rank} twice, in {before} and {name}",
                "must hold each file of a rank once",
                "remove the copy",
            )


def _lines_of(document: Document, name: str, data: bytes) -> np.ndarray:
    if data.count(b"\n") <= 1 and len(data) < 100:  # a rank without a token writes the header alone
        return np.empty((0, 3), np.int64)
    return _lines(parse_document(str(Path(document.name) / name), data))


def _lines(document: Document) -> np.ndarray:
    """The lines of one file, int64 (lines, 3)."""
    header, table = document.value
    if header != _HEADER:
        raise document.error(f"with the header {','.join(header)[:40]!r}", f"must have {','.join(_HEADER)}", "add it")
    table = document.numbers(table, "its lines", (2,), integers=True)
    document.check_total(table[:, 2], "its counts")
    if table[:, :2].min() < 0 or table[:, :2].max() >= 2**31:
        raise document.error(
            f"with ids from {table[:, :2].min()} to {table[:, :2].max()}", "must have ids from 0", "correct them"
        )
    return table


DETAIL = Format(
    ENTRIES["sglang-detail"],
    _matches_detail,
    _read_detail,
    _write_detail,
    model_layers=True,
    kept_metadata=(HIDDEN_LAYERS,),
)
CSV = Format(ENTRIES["sglang-csv"], _matches_csv, _read_csv, _write_csv, model_layers=True)
