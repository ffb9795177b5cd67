"""TensorRT-LLM: its load balancer's placement, and the statistics that it records.

The load balancer's: YAML or JSON with `num_slots`, `layer_updates_per_iter` and

    initial_global_assignments: {model layer: [num_slots logical ids]}

The keys are the model's own layers (3 to 60 for DeepSeek-V3); num_slots / EP slots in a row belong to a rank, and where
EP does not divide them, one more to each of the first (NVIDIA/TensorRT-LLM#13888). Layers of multi-token prediction
follow the hidden layers (61), and nothing says that they are such.

Statistics: a folder of meta_info.json and rank<r>.safetensors. Each tensor `<iteration>_<layer>` (E,) counts one rank's
tokens in one iteration and one of the model's own layers; ranks are summed here. Under the load balancer the counts are
per slot, and `num_experts` is the number of slots; the files do not tell which of the two they are. Files
rank<r>_raw.safetensors keep the selected ids and are left alone.
"""

from __future__ import annotations

import json
import re

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document, missing_ranks, parse_document, read_bytes
from evenmoe.formats.findings import number_gaps
from evenmoe.formats.layer_numbers import mtp_numbers
from evenmoe.formats.values import numbered_rows, slots_of, smallest_counts, whole_counts
from evenmoe.io import ALLOWANCE_BYTES
from evenmoe.io.safetensors_file import safetensors_bytes
from evenmoe.io.text import json_bytes
from evenmoe.placement import Placement

_META = "meta_info.json"
_RANK_FILE = re.compile(r"rank([0-9]{1,6})\.safetensors")
_KEY = re.compile(r"([0-9]{1,9})_([0-9]{1,6})")

_LAYERS, _UPDATES = "initial_global_assignments", "layer_updates_per_iter"


def _matches_placement(document: Document) -> bool:
    fields = document.fields
    return "record_type" not in fields and (_LAYERS in fields or {"num_slots", _UPDATES} <= set(fields))


def _read_placement(document: Document, options: ReadOptions) -> RawPlacement:
    if _LAYERS not in document.fields and "num_slots" in document.fields:
        raise document.error(
            f"of {document.integer(document.fields['num_slots'], '`num_slots`')} slots without `{_LAYERS}`, as the "
            "online load balancer takes it",
            "must say which expert each slot holds to be a placement",
            "plan one from recorded statistics (evenmoe plan --to tensorrt-llm); the server itself starts without one",
        )
    rows, _ = numbered_rows(document, document.fields.get(_LAYERS), f"`{_LAYERS}`")
    raw = RawPlacement(list(rows.values()), layer_ids=tuple(rows), may_be_uneven=True)
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


def _write_placement(value: Placement, options: WriteOptions) -> bytes:
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


def _matches_statistics(document: Document) -> bool:
    return (document.value / _META).is_file()


def _read_statistics(document: Document, options: ReadOptions) -> RawLoad:
    folder = document.value
    if not _matches_statistics(document):
        raise document.error(f"a folder without {_META}", "must hold it", "see EXPERT_STATISTIC_PATH")
    meta = parse_document(str(folder / _META), read_bytes(folder / _META))
    stated = meta.fields.get("num_experts")
    files = sorted(
        (int(match.group(1)), path) for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))
    )
    if not files:
        raise document.error(
            "a folder without rank<r>.safetensors", "must hold one a rank", "record some traffic first"
        )
    counts: dict[tuple[int, int], np.ndarray] = {}
    for _, path in files:
        _add_rank(parse_document(str(path), read_bytes(path)), counts)
    raw = _table(document, counts)
    if stated is not None and meta.integer(stated, "`num_experts`") != raw.load.shape[2]:
        raise meta.error(
            f"with `num_experts` {stated}", f"must say the {raw.load.shape[2]} of its tensors", "correct it"
        )
    known = {key: value for key, value in meta.fields.items() if isinstance(value, (int, float, str))}
    raw.metadata.update({key: value for key, value in known.items() if key != "num_experts"})  # `write` counts them
    if options.placement is None and options.num_experts is None:
        raw.notes.append(
            f"took the {raw.load.shape[2]} counts for those of experts: recorded under TensorRT-LLM's load balancer "
            "they are of slots, which the files do not tell; then pass its placement (--map FILE)"
        )
    raw.notes.append(f"summed {len(files)} ranks")
    raw.findings.extend(missing_ranks([rank for rank, _ in files]))
    return raw


def _write_statistics(value: Load, options: WriteOptions) -> dict[str, bytes]:
    assert options.layer_ids is not None
    counts = smallest_counts(whole_counts(value, "tensorrt-llm-statistics"), options)
    known = {key: item for key, item in options.metadata.items() if isinstance(item, (int, float, str))}
    tensors = {
        f"{step}_{layer}": np.ascontiguousarray(counts[step, row])
        for step in range(len(counts))
        for row, layer in enumerate(options.layer_ids)
    }
    meta = {**known, "num_experts": value.shape[2]}
    return {_META: (json.dumps(meta) + "\n").encode(), "rank0.safetensors": safetensors_bytes(tensors)}


def _add_rank(document: Document, counts: dict[tuple[int, int], np.ndarray]) -> None:
    if document.container != "safetensors":
        raise document.error(f"a {document.container} file", "must be safetensors", "record again")
    for name, tensor in document.value[0].items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise document.error(
                f"with the tensor {name[:40]!r}", "must name tensors <iteration>_<layer>", "record again"
            )
        key = int(match.group(1)), int(match.group(2))
        row = document.numbers(tensor, f"the tensor {name!r}", (1,))
        if key in counts and counts[key].shape != row.shape:
            raise document.error(f"with {len(row)} experts in {name!r}", "must have as many on every rank", "check it")
        with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and found as such
            counts[key] = counts[key] + row if key in counts else row.copy()


def _table(document: Document, counts: dict[tuple[int, int], np.ndarray]) -> RawLoad:
    if not counts:
        raise document.error("a folder without a single count", "must hold counts", "record some traffic first")
    steps = sorted({step for step, _ in counts})
    layers = sorted({layer for _, layer in counts})
    experts = len(next(iter(counts.values())))
    if any(len(row) != experts for row in counts.values()):
        raise document.error("with different numbers of experts", "must have as many in every layer", "check it")
    if 8 * len(steps) * len(layers) * experts > 8 * 8 * len(counts) * experts + ALLOWANCE_BYTES:
        raise document.error(
            f"with {len(counts)} counts for {len(steps)} iterations of {len(layers)} layers",
            "must have most layers in most iterations",
            "record again",
        )
    real = any(row.dtype.kind == "f" for row in counts.values())
    load = np.zeros((len(steps), len(layers), experts), np.float64 if real else np.int64)
    for (step, layer), row in counts.items():
        load[steps.index(step), layers.index(layer)] = row
    raw = RawLoad(load, tuple(layers))
    missing = len(steps) * len(layers) - len(counts)
    if missing:
        raw.notes.append(f"took {missing} layers of iterations that no rank counted for zeros")
    return raw


PLACEMENT = Format(
    ENTRIES["tensorrt-llm"],
    _matches_placement,
    _read_placement,
    _write_placement,
    model_layers=True,
    mtp_layers=True,
    kept_metadata=(_UPDATES,),
    uneven_ranks="first",
)
STATISTICS = Format(
    ENTRIES["tensorrt-llm-statistics"],
    _matches_statistics,
    _read_statistics,
    _write_statistics,
    model_layers=True,
    kept_metadata=None,
)
