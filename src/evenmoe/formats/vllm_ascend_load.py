"""Loads of vllm-ascend: a tensor (L, E); per slot (L, D, P/D); or (T, L, D, P/D) for T stages.

Counts per slot mean nothing without the placement under which they were counted.
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats import eplb_table, slot_map
from evenmoe.formats.arrays_output import array_bytes
from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import one_window


def matches(document: Document) -> bool:
    value = document.value
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3, 4) or value.dtype.kind not in "iuf":
        return False
    return not slot_map.fits(value) and not eplb_table.fits(value)


def read(document: Document, options: Options) -> RawLoad:
    counts = document.numbers(document.value, "its tensor", (2, 3, 4))
    if counts.ndim == 2:
        return RawLoad(counts[None])
    if options.placement is None:
        raise document.refuse(
            f"of shape {counts.shape}, counts per slot",
            "must be read with the placement that was in use",
            "pass placement (--map FILE)",
        )
    counts = counts[None] if counts.ndim == 3 else counts
    return RawLoad(counts.reshape(*counts.shape[:2], -1))


def write(value: Load, options: WriteOptions) -> bytes:
    return array_bytes(one_window(value, options), options.container)
