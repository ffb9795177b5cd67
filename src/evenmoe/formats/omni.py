"""omni-infer: the pattern that says which device holds which expert, 0 or 1 for each (device, layer, expert).

An .npy of integers (D, L, E), which the program loads (`pattern_path`); or text, the header `D L E` and then the same
numbers. Layers are MoE layers, counted from 0. A device keeps its experts in ascending order, and may hold one once.
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import array_bytes, slots_by_rank
from evenmoe.placement import Placement


def is_pattern(value: object) -> bool:
    """Whether an array is such a pattern: every expert on a device, as many on each."""
    if not isinstance(value, np.ndarray) or value.ndim != 3 or not value.size or value.dtype.kind not in "iu":
        return False
    if value.min() != 0 or value.max() != 1 or not value.any(axis=0).all():
        return False
    held = value.sum(axis=2, dtype=np.int64)
    return bool((held == held[0, 0]).all())


def _matches(document: Document) -> bool:
    if document.container == "text":
        return isinstance(document.value, np.ndarray)
    return is_pattern(document.value)


def _read(document: Document, options: ReadOptions) -> RawPlacement:
    pattern = document.numbers(document.value, "its pattern", (3,), integers=True)
    if pattern.min() < 0 or pattern.max() > 1:
        raise document.error(
            f"with numbers from {pattern.min()} to {pattern.max()}", "must hold 0 and 1 alone", "write it again"
        )
    by_layer = pattern.transpose(1, 0, 2)
    return RawPlacement(
        [np.nonzero(layer)[1] for layer in by_layer],
        [layer.sum(axis=1).tolist() for layer in by_layer],
        num_experts=pattern.shape[2],
    )


def _write(value: Placement, options: WriteOptions) -> bytes:
    slots = slots_by_rank(value, "omni-pattern", options)
    pattern = np.zeros((value.num_ranks, value.num_layers, value.num_experts), np.int32)
    layer, rank, _ = np.indices(slots.shape)
    pattern[rank, layer, slots] = 1
    if (np.diff(slots, axis=2) < 0).any():
        options.notes.append("left out the order of slots within ranks: the program sorts the experts of a device")
    if options.container == "text":
        digits = pattern.astype(np.uint8).reshape(-1) + ord("0")
        return f"{' '.join(map(str, pattern.shape))}\n".encode() + _spaced(digits)
    return array_bytes(pattern, "npy")


def _spaced(digits: np.ndarray) -> bytes:
    """The digits with a space between, a line feed at the end."""
    text = np.full((len(digits), 2), ord(" "), np.uint8)
    text[:, 0] = digits
    text[-1, 1] = ord("\n")
    return text.tobytes()


PATTERN = Format(ENTRIES["omni-pattern"], _matches, _read, _write, stores_ranks=True)
