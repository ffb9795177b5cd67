"""SGLang's old recorder: CSV with header layer_id,expert_id,count; layer ids are the model's."""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.formats.hidden_layers import without_dense
from evenmoe.formats.values import one_window, whole_counts

_HEADER = ["layer_id", "expert_id", "count"]


def matches(document: Document) -> bool:
    return document.value[0] == _HEADER


def read(document: Document, options: Options) -> RawLoad:
    header, table = document.value
    if header != _HEADER:
        raise document.refuse(f"with the header {','.join(header)[:40]!r}", f"must have {','.join(_HEADER)}", "add it")
    table = document.numbers(table, "its lines", (2,), integers=True)
    layers, experts, counts = table.T
    document.check_total(counts, "its counts")
    if table[:, :2].min() < 0 or table[:, :2].max() >= 2**31:
        raise document.refuse(
            f"with ids from {table[:, :2].min()} to {table[:, :2].max()}", "must have ids from 0", "correct them"
        )
    numbers, row = np.unique(layers, return_inverse=True)
    width = max(int(experts.max()) + 1, options.num_experts or 0)
    if 8 * len(numbers) * width > 8 * table.nbytes // 3 + ALLOWANCE_BYTES:
        raise document.refuse(
            f"with {len(table)} lines for {len(numbers)} layers of {width} experts",
            "must have a line for most experts",
            "check the expert ids",
        )
    load = np.zeros((1, len(numbers), width), np.int64)
    np.add.at(load[0], (row, experts), counts)
    raw = without_dense(document, load)
    assert raw.layer_ids is not None
    raw.layer_ids = tuple(int(numbers[row]) for row in raw.layer_ids)
    raw.metadata.clear()  # the lines do not tell the hidden layers
    twice = len(table) - len(np.unique(layers * width + experts))
    if twice:
        raw.notes.append(f"added up {twice} lines that name a layer and an expert again")
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    counts = whole_counts(one_window(value, options), "sglang-csv")
    assert options.layer_ids is not None
    lines = [
        f"{layer},{expert},{count}"
        for layer, row in zip(options.layer_ids, counts.tolist(), strict=True)
        for expert, count in enumerate(row)
    ]
    return ("\n".join([",".join(_HEADER), *lines]) + "\n").encode()
