"""vLLM with profiling marks: one step's loads and map, {"step_idx", "ep_size", "expert_load_pass": {"shape", "dtype",
"value"}, "physical_to_logical_map": {…}}, both (MoE layers, slots) and flat.

A rank writes its own tokens' counts; a file holds one such object, a list of them, or one a line. In a folder the ranks
of a step are summed. Each step is a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Load, RawLoad, ReadOptions
from evenmoe.formats.document import (
    Document,
    files_in,
    left_out,
    one_rank_alone,
    parse_document,
    ranks_summed,
    read_bytes,
)
from evenmoe.formats.values import to_logical
from evenmoe.io import ALLOWANCE_BYTES, Value

_LOAD, _MAP, _STEP = "expert_load_pass", "physical_to_logical_map", "step_idx"


def _matches(document: Document) -> bool:
    if document.container == "folder":
        files = _files(document)
        return bool(files) and _matches(parse_document(str(files[0]), read_bytes(files[0])))
    return any(isinstance(payload, Mapping) and _LOAD in payload for payload in _payloads(document)[:100])


def _files(document: Document) -> list[Path]:
    return sorted([*files_in(document.value, ".json"), *files_in(document.value, ".jsonl")])


def _payloads(document: Document) -> list[Value]:
    value = document.value
    return value if isinstance(value, list) else [value]


def _read(document: Document, options: ReadOptions) -> RawLoad:
    notes: list[str] = []
    windows: dict[int, Load] = {}
    files = list(_documents(document, notes))
    for file in files:
        for step, load in _windows(file, options):
            before = windows.get(step)
            if before is not None and before.shape != load.shape:
                raise document.error(
                    f"with {before.shape[1]} and {load.shape[1]} experts in step {step}",
                    "must hold steps of one model",
                    "put each model's files into a folder of their own, or pass num_experts (--experts)",
                )
            windows[step] = load if before is None else before + load
    if not windows:
        raise document.error(f"without `{_LOAD}`", "must hold it for a step", "record some traffic first")
    if len({load.shape for load in windows.values()}) > 1:
        raise document.error("with steps of different shapes", "must keep one", "pass num_experts (--experts)")
    raw = RawLoad(np.stack([windows[step] for step in sorted(windows)]), has_own_map=True, notes=notes)
    document.check_total(raw.load, "its counts over all ranks")
    raw.notes.append(one_rank_alone(None) if len(files) == 1 else ranks_summed([], "steps"))
    return raw


def _documents(document: Document, notes: list[str]) -> Iterator[Document]:
    if document.container != "folder":
        yield document
        return
    files = _files(document)
    if not files:
        raise document.error("a folder without .json or .jsonl", "must hold one a rank", "name the folder of the files")
    notes += left_out(document.value, files)
    for path in files:
        yield parse_document(str(path), read_bytes(path))


def _windows(file: Document, options: ReadOptions) -> Iterator[tuple[int, Load]]:
    """(step, counts of experts (L, E)) of every payload."""
    seen: set[int] = set()
    held = 0
    payloads = _payloads(file)
    for number, payload in enumerate(payloads):
        if not isinstance(payload, Mapping) or _LOAD not in payload:
            raise file.error(f"with item {number}, which has no `{_LOAD}`", "must hold a step in every item", "drop it")
        where = f"item {number}"
        load = _tensor(file, payload, _LOAD, where)
        slots = _tensor(file, payload, _MAP, where)
        step = payload.get(_STEP, number)
        step = file.integer(step, f"`{_STEP}` of {where}")
        if step in seen:
            raise file.error(f"with step {step} twice", "must hold each step of a rank once", "drop the copy")
        seen.add(step)
        logical = to_logical(file, load[None], slots, options.num_experts)[0]
        held += logical.nbytes - load.nbytes - slots.nbytes
        if held > ALLOWANCE_BYTES:
            raise file.error(f"read with {logical.shape[1]} experts", "must have a slot for each", "check --experts")
        yield step, logical


def _tensor(file: Document, payload: Mapping[str, Value], key: str, where: str) -> np.ndarray:
    """A tensor (L, P) from its shape and flat values."""
    found = payload.get(key)
    if not isinstance(found, Mapping):
        raise file.error(f"without `{key}` in {where}", "must hold its shape and value", "record again")
    shape = file.numbers(found.get("shape"), f"`{key}.shape` of {where}", (1,), integers=True)
    values = file.numbers(found.get("value"), f"`{key}.value` of {where}", (1,), integers=True)
    if len(shape) != 2 or shape.min() < 1 or int(shape[0]) * int(shape[1]) != len(values):
        raise file.error(
            f"with {len(values)} values of `{key}` in {where} for the shape {shape.tolist()[:8]}",
            "must have (layers, slots) of them",
            "record again",
        )
    return values.reshape(shape.tolist())


PAYLOAD = Format(ENTRIES["vllm-payload"], _matches, _read)
