"""SGLang's recorder in mode stat: {"rank", "logical_count": int32 (T, L, E), "average_utilization_rate_over_window"}.

The counts are already summed over ranks; every hidden layer has a row, a dense one zeros.
"""

from __future__ import annotations

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.hidden_layers import load_with_dense, without_dense
from evenmoe.formats.values import smallest_counts, whole_counts
from evenmoe.io.torch_file import torch_bytes

_UTILISATION = "average_utilization_rate_over_window"


def matches(document: Document) -> bool:
    return {"rank", "logical_count"} <= set(document.fields)


def read(document: Document, options: Options) -> RawLoad:
    load = document.numbers(document.fields.get("logical_count"), "`logical_count`", (3,))
    raw = without_dense(document, load)
    rate = document.fields.get(_UTILISATION)
    if isinstance(rate, float):
        raw.metadata[_UTILISATION] = rate
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    counts = smallest_counts(whole_counts(value, "sglang-stat"), options)
    return torch_bytes(
        {
            "rank": 0,
            "logical_count": load_with_dense(counts, options),
            _UTILISATION: options.metadata.get(_UTILISATION),
        }
    )
