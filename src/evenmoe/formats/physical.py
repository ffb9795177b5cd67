"""Counts per slot → counts per logical expert."""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import IntArray, Load
from evenmoe.formats.document import ALLOWANCE_BYTES, Document


def to_logical(document: Document, per_slot: Load, slots: IntArray, num_experts: int | None) -> Load:
    """Sum the slots of each expert.

    Args:
        document: named in errors.
        per_slot: (T, L, P), tokens per slot.
        slots: int64 (L, P), the logical expert of each slot.
        num_experts: E; default: the largest id + 1.

    Returns:
        (T, L, E), dtype of `per_slot`.
    """
    if slots.shape != per_slot.shape[1:]:
        raise document.refuse(
            f"with counts of {per_slot.shape[1]} layers and {per_slot.shape[2]} slots",
            f"must fit its placement's {slots.shape[0]} layers and {slots.shape[1]} slots",
            "give the placement that was in use when it was recorded",
        )
    experts = num_experts or int(slots.max()) + 1
    wrong = np.argwhere((slots < 0) | (slots >= min(experts, slots.shape[1])))
    if len(wrong):
        layer, slot = wrong[0].tolist()
        raise document.refuse(
            f"with expert {slots[layer, slot]} in layer {layer}, slot {slot} of its placement",
            f"must place experts 0 to {min(experts, slots.shape[1]) - 1}",
            "check the placement",
        )
    # Before anything is allocated: a number of experts may be any.
    if per_slot.itemsize * len(per_slot) * per_slot.shape[1] * experts > 9 * per_slot.nbytes + ALLOWANCE_BYTES:
        raise document.refuse(f"read with {experts} experts", "must have a slot for each", "check --experts")
    logical = np.zeros((*per_slot.shape[:2], experts), per_slot.dtype)
    for layer, row in enumerate(slots):
        np.add.at(logical[:, layer].T, row, per_slot[:, layer].T)
    return logical
