"""TensorRT-LLM's statistics: a folder of meta_info.json and rank<r>.safetensors.

Each tensor `<iteration>_<layer>` (E,) counts one rank's tokens in one iteration and one of the model's own layers;
ranks are summed here. Under its load balancer the counts are per slot, and `num_experts` is the number of slots; the
files do not tell which of the two they are. Files rank<r>_raw.safetensors keep the selected ids and are left alone.
"""

from __future__ import annotations

import json
import re

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.source import parse_document, read_bytes
from evenmoe.formats.values import smallest_counts, whole_counts

_META = "meta_info.json"
_FILE = re.compile(r"rank([0-9]{1,6})\.safetensors")
_KEY = re.compile(r"([0-9]{1,9})_([0-9]{1,6})")


def matches(document: Document) -> bool:
    return (document.value / _META).is_file()


def read(document: Document, options: Options) -> RawLoad:
    folder = document.value
    if not matches(document):
        raise document.refuse(f"a folder without {_META}", "must hold it", "see EXPERT_STATISTIC_PATH")
    meta = parse_document(str(folder / _META), read_bytes(folder / _META))
    stated = meta.fields.get("num_experts")
    files = sorted((int(match.group(1)), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not files:
        raise document.refuse(
            "a folder without rank<r>.safetensors", "must hold one a rank", "record some traffic first"
        )
    counts: dict[tuple[int, int], np.ndarray] = {}
    for _, path in files:
        _add_rank(parse_document(str(path), read_bytes(path)), counts)
    raw = _table(document, counts)
    if stated is not None and meta.integer(stated, "`num_experts`") != raw.load.shape[2]:
        raise meta.refuse(
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
    if [rank for rank, _ in files] != list(range(len(files))):
        text = f"ranks {files[0][0]} to {files[-1][0]}, {len(files)} of them"
        raw.findings.append(Finding("error", "missing-rank", text, "should have a file of every rank", "add it"))
    return raw


def write(value: Load, options: WriteOptions) -> dict[str, bytes]:
    from safetensors.numpy import save

    assert options.layer_ids is not None
    counts = smallest_counts(whole_counts(value, "tensorrt-llm-statistics"), options)
    known = {key: item for key, item in options.metadata.items() if isinstance(item, (int, float, str))}
    tensors = {
        f"{step}_{layer}": np.ascontiguousarray(counts[step, row])
        for step in range(len(counts))
        for row, layer in enumerate(options.layer_ids)
    }
    meta = {**known, "num_experts": value.shape[2]}
    return {_META: (json.dumps(meta) + "\n").encode(), "rank0.safetensors": save(tensors)}


def _add_rank(document: Document, counts: dict[tuple[int, int], np.ndarray]) -> None:
    if document.container != "safetensors":
        raise document.refuse(f"a {document.container} file", "must be safetensors", "record again")
    for name, tensor in document.value[0].items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise document.refuse(
                f"with the tensor {name[:40]!r}", "must name tensors <iteration>_<layer>", "record again"
            )
        key = int(match.group(1)), int(match.group(2))
        row = document.numbers(tensor, f"the tensor {name!r}", (1,))
        if key in counts and counts[key].shape != row.shape:
            raise document.refuse(f"with {len(row)} experts in {name!r}", "must have as many on every rank", "check it")
        with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and found as such
            counts[key] = counts[key] + row if key in counts else row.copy()


def _table(document: Document, counts: dict[tuple[int, int], np.ndarray]) -> RawLoad:
    if not counts:
        raise document.refuse("a folder without a single count", "must hold counts", "record some traffic first")
    steps = sorted({step for step, _ in counts})
    layers = sorted({layer for _, layer in counts})
    experts = len(next(iter(counts.values())))
    if any(len(row) != experts for row in counts.values()):
        raise document.refuse("with different numbers of experts", "must have as many in every layer", "check it")
    if 8 * len(steps) * len(layers) * experts > 8 * 8 * len(counts) * experts + ALLOWANCE_BYTES:
        raise document.refuse(
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
