"""evenmoe's trace: .npz with `load` (T, L, E) and, where known, the model's `layer_ids` (L,)."""

from __future__ import annotations

import io

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document


def matches(document: Document) -> bool:
    return "load" in document.fields


def read(document: Document, options: Options) -> RawLoad:
    load = document.numbers(document.fields.get("load"), "`load`", (2, 3))
    raw = RawLoad(load[None] if load.ndim == 2 else load)
    if "layer_ids" in document.fields:
        numbers = document.numbers(document.fields["layer_ids"], "`layer_ids`", (1,), integers=True)
        if len(numbers) != raw.load.shape[1]:
            raise document.refuse(
                f"with {len(numbers)} `layer_ids` for {raw.load.shape[1]} layers",
                "must number every layer",
                "correct it",
            )
        raw.layer_ids = tuple(numbers.tolist())
    if "routing" in document.fields:
        raw.notes.append("left out `routing`: a load has only counts")
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    arrays: dict[str, np.ndarray] = {"load": value}
    if options.layer_ids is not None:
        arrays["layer_ids"] = np.array(options.layer_ids, np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
