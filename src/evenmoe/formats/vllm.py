"""vLLM: expert maps and recorded loads of its pull requests; and LMDeploy's list, which looks like one of them.

#49572: a JSON list of P logical experts for all layers, or a list of them for each MoE layer.
#53022: a JSON object from MoE layer to its P logical experts; #41141's mapping record holds the same inside.
#41141: safetensors with one tensor {model name: float32 (L, E)} and metadata {"version": "1"}. Before: JSON lines, one
record of type `eplb_load_stats` a window, with `expert_load` (L, P), tokens per slot, and `p2l_map` (L, P); a record
`eplb_load_meta` may come first.
LMDeploy and DLBlas: a JSON list of every layer's loads (L, E).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import layer_number, numbered_rows, one_window, slot_rows, slots_of, to_logical
from evenmoe.io import Value
from evenmoe.io.safetensors_file import safetensors_bytes
from evenmoe.io.text import json_bytes
from evenmoe.placement import Placement

_RECORD, _INSIDE = "eplb_initial_mapping", "initial_global_assignments"
_STATS, _META = "eplb_load_stats", "eplb_load_meta"
_EXACT = 2**24  # float32 holds every whole number up to here
_LARGEST = float(np.finfo(np.float32).max)


def _matches_list(document: Document) -> bool:
    return _is_slot_rows(document.value) is not None


def _is_slot_rows(value: Value) -> bool | None:
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


def _read_list(document: Document, options: ReadOptions) -> RawPlacement:
    value = document.value
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        return RawPlacement(slot_rows(document, value, "its list"))
    row = document.numbers(value, "its list", (1,), integers=True)
    layers = options.num_layers or 1
    if layers > 1 << 16:
        raise document.error(f"read for {layers} layers", "must have at most 65536", "check --num-layers")
    raw = RawPlacement([row] * layers)
    raw.notes.append(f"one list for all layers, taken for {layers} (--num-layers)")
    return raw


def _write_list(value: Placement, options: WriteOptions) -> bytes:
    return json_bytes(slots_of(value, options))


def _matches_layer_map(document: Document) -> bool:
    fields = document.fields
    if document.says("record_type", _RECORD):
        return True
    return bool(fields) and all(
        layer_number(key) is not None and isinstance(row, np.ndarray) and row.ndim == 1 for key, row in fields.items()
    )


def _read_layer_map(document: Document, options: ReadOptions) -> RawPlacement:
    record = document.says("record_type", _RECORD)
    rows, named = numbered_rows(document, document.fields.get(_INSIDE) if record else document.value, "its layers")
    raw = RawPlacement(list(rows.values()))
    if named:  # names like model.layers.3.mlp.experts carry the model's own numbers
        raw.layer_ids = tuple(rows)
    elif list(rows) != list(range(len(rows))):
        text = f"layers {min(rows)} to {max(rows)}, {len(rows)} of them"
        rule = "must count MoE layers from 0 without gaps"
        fix = "renumber them, or name them model.layers.<number> if these are the model's own numbers"
        raw.findings.append(Finding("error", "layer-numbering", text, rule, fix, layer=min(rows), fatal=True))
    return raw


def _write_layer_map(value: Placement, options: WriteOptions) -> bytes:
    return json_bytes({str(layer): row for layer, row in enumerate(slots_of(value, options))})


def _matches_safetensors(document: Document) -> bool:
    tensors, _ = document.value
    return bool(tensors) and all(tensor.ndim == 2 for tensor in tensors.values())


def _read_safetensors(document: Document, options: ReadOptions) -> RawLoad:
    tensors, metadata = document.value
    if len(tensors) != 1:
        names = ", ".join(repr(name[:40]) for name in list(tensors)[:5])
        raise document.error(f"with {len(tensors)} models: {names}", "must hold one model", "write one file for each")
    ((model, tensor),) = tensors.items()
    load = document.numbers(tensor, f"the tensor {model[:40]!r}", (2,))
    if load.dtype.kind == "f" and (np.abs(load) <= _EXACT).all() and (load == np.rint(load)).all():
        load = load.astype(np.int64)  # counts, in the only type that the format has
    raw = RawLoad(load[None], metadata={"model": model})
    if metadata.get("version", "1") != "1":
        raw.notes.append(f"version {metadata['version'][:20]!r}, read as version 1")
    return raw


def _write_safetensors(value: Load, options: WriteOptions) -> bytes:
    load = one_window(value, options)
    if load.max() > _LARGEST:
        layer, expert = np.unravel_index(int(load.argmax()), load.shape)
        raise ConstraintError(
            "value",
            f"{load.max():.6g} in layer {layer}, expert {expert}",
            "must be at most 3.4e38 for vllm-safetensors, which holds float32",
            "divide the load by a common factor, or use another format",
        )
    rounded = load.astype(np.float32)
    if (rounded.astype(np.float64) != load).any():
        options.notes.append("rounded to float32, which the format demands")
    return safetensors_bytes({str(options.metadata.get("model", "model")): rounded}, {"version": "1"})


def _matches_jsonl(document: Document) -> bool:
    return any(_kind(record) == _STATS for record in _records(document))


def _read_jsonl(document: Document, options: ReadOptions) -> RawLoad:
    windows: list[Load] = []
    metadata: dict[str, Value] = {}
    for line, record in enumerate(_records(document), start=1):
        kind = _kind(record)
        if kind == _META and isinstance(record.get("model"), str):
            metadata["model"] = record["model"]
        if kind not in (_STATS, _META):
            raise document.error(f"with record {line} of type {kind[:40]!r}", f"must hold {_STATS}", "drop it")
        if kind == _STATS:
            windows.append(_window(document, record, line, options))
    if not windows:
        raise document.error("without a record of loads", f"must hold {_STATS}", "record some traffic first")
    if any(window.shape != windows[0].shape for window in windows):
        raise document.error("with windows of different shapes", "must keep one", "pass num_experts (--experts)")
    return RawLoad(np.stack(windows), has_own_map=True, metadata=metadata)


def _write_jsonl(value: Load, options: WriteOptions) -> bytes:
    layers, experts = value.shape[1:]
    slots = np.tile(np.arange(experts), (layers, 1)).tolist()
    records: list[dict[str, Value]] = []
    if "model" in options.metadata:
        records.append({"record_type": _META, "version": 1, "model": options.metadata["model"]})
    for step, window in enumerate(value):
        stats = {"record_type": _STATS, "version": 1, "step": step, "num_ranks": 1}
        records.append({**stats, "expert_load": window.tolist(), "p2l_map": slots})
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _records(document: Document) -> list[Value]:
    return document.value if isinstance(document.value, list) else [document.value]


def _kind(record: Value) -> str:
    kind = record.get("record_type") if isinstance(record, Mapping) else None
    return kind if isinstance(kind, str) else ""


def _window(document: Document, record: Mapping[str, Value], line: int, options: ReadOptions) -> Load:
    load = document.numbers(record.get("expert_load"), f"`expert_load` of record {line}", (2,))
    slots = document.numbers(record.get("p2l_map"), f"`p2l_map` of record {line}", (2,), integers=True)
    return to_logical(document, load[None], slots, options.num_experts)[0]


def _matches_lmdeploy(document: Document) -> bool:
    value = document.value
    return isinstance(value, np.ndarray) and value.ndim == 2 and _is_slot_rows(value) is not True


def _read_lmdeploy(document: Document, options: ReadOptions) -> RawLoad:
    return RawLoad(document.numbers(document.value, "its list", (2,))[None])


def _write_lmdeploy(value: Load, options: WriteOptions) -> bytes:
    return json_bytes(one_window(value, options))


LIST = Format(ENTRIES["vllm-list"], _matches_list, _read_list, _write_list)
LAYER_MAP = Format(ENTRIES["vllm-layer-map"], _matches_layer_map, _read_layer_map, _write_layer_map)
SAFETENSORS = Format(
    ENTRIES["vllm-safetensors"], _matches_safetensors, _read_safetensors, _write_safetensors, kept_metadata=("model",)
)
JSONL = Format(ENTRIES["vllm-jsonl"], _matches_jsonl, _read_jsonl, _write_jsonl, kept_metadata=("model",))
LMDEPLOY = Format(ENTRIES["lmdeploy"], _matches_lmdeploy, _read_lmdeploy, _write_lmdeploy)
