"""Rows for every hidden layer, as SGLang keeps them: dense layers are rows of zeros, or of the trivial map."""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Load, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import ranges
from evenmoe.placement import Placement


def without_dense(document: Document, load: Load) -> RawLoad:
    """The load without layers in which no window has a token; what they were is noted.

    Raises FileFormatError where that leaves nothing.
    """
    seen = (load != 0).any(axis=(0, 2))  # NaN counts as seen, and is found later
    rows = np.flatnonzero(seen).tolist()
    if not rows:
        raise document.refuse("without a single token", "must hold recorded counts", "record some traffic first")
    raw = RawLoad(load if len(rows) == len(seen) else load[:, rows], tuple(rows))
    raw.metadata["num_hidden_layers"] = len(seen)
    dense = np.flatnonzero(~seen).tolist()
    if dense:
        raw.notes.append(f"left out {len(dense)} layers without a token, taken for dense ones: {ranges(dense)}")
    return raw


def load_with_dense(load: Load, options: WriteOptions) -> Load:
    """(T, every hidden layer, E): rows of zeros where `options.layer_ids` skips."""
    numbers, count = _every(options)
    full = np.zeros((load.shape[0], count, load.shape[2]), load.dtype)
    full[:, numbers] = load
    return full


def slots_with_dense(value: Placement, options: WriteOptions) -> np.ndarray:
    """(every hidden layer, P): slot i → expert i mod E where `options.layer_ids` skips."""
    numbers, count = _every(options)
    full = np.tile(np.arange(value.num_slots, dtype=np.int32) % value.num_experts, (count, 1))
    full[numbers] = value.slot_to_expert
    return full


def _every(options: WriteOptions) -> tuple[list[int], int]:
    assert options.layer_ids is not None  # `write` demands them for formats that number the model's layers
    numbers = list(options.layer_ids)
    count = max(numbers[-1] + 1, options.num_hidden_layers or 0)
    if count > len(numbers):
        options.notes.append(f"filled {count - len(numbers)} layers in as dense: {ranges(_others(numbers, count))}")
    return numbers, count


def _others(numbers: list[int], count: int) -> list[int]:
    return sorted(set(range(count)).difference(numbers))
