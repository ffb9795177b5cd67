"""A placement's rows out of a parsed file: one array of slots per layer, of one length or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from evenmoe.formats.contents import IntArray
from evenmoe.formats.document import Document

_LAYER_IN_NAME = re.compile(r"(?:.*\.)?layers\.([0-9]{1,6})(?:\..*)?")


def slot_rows(document: Document, value: Any, where: str) -> list[IntArray]:
    """Integers (L, P), or L rows of different lengths, which `check` names."""
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.size:
        return list(document.numbers(value, where, (2,), integers=True))
    if isinstance(value, list) and value and all(isinstance(row, np.ndarray) and row.ndim == 1 for row in value):
        return [
            document.numbers(row, f"{where}[{layer}]", (1,), integers=True) if row.size else row.astype(np.int64)
            for layer, row in enumerate(value)
        ]
    document.numbers(value, where, (2,), integers=True)  # says what is there instead
    raise document.refuse(f"with {where} that is empty", "must have a row per layer", "check how it was written")


def numbered_rows(document: Document, value: Any, where: str) -> tuple[dict[int, IntArray], bool]:
    """{layer: slots} in ascending order, from keys like 3, "3" or "model.layers.3.mlp"; whether any was such a name."""
    if not isinstance(value, Mapping) or not value:
        raise document.refuse(f"without layers in {where}", "must map layers to slots", "check how it was written")
    rows: dict[int, IntArray] = {}
    named = False
    for key, row in value.items():
        number = layer_number(key)
        if number is None or number in rows:
            raise document.refuse(
                f"with the key {str(key)[:40]!r} in {where}", "must have a layer's number as key, once", "correct it"
            )
        named = named or (isinstance(key, str) and not key.isdigit())
        rows[number] = document.numbers(row, f"{where}, layer {number}", (1,), integers=True)
    return dict(sorted(rows.items())), named


def layer_number(key: Any) -> int | None:
    """The layer that a key names, None where it names none."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key if 0 <= key < 10**6 else None
    if not isinstance(key, str):
        return None
    if key.isascii() and key.isdigit() and len(key) <= 6:
        return int(key)
    match = _LAYER_IN_NAME.fullmatch(key)
    return int(match.group(1)) if match else None
