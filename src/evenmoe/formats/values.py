"""From a file's rows to placements and loads, and back: what the formats of several tools have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import IntArray, Load, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.io import ALLOWANCE_BYTES, Value
from evenmoe.io.npz import npy_bytes, npz_bytes
from evenmoe.io.text import json_bytes
from evenmoe.placement import Placement
from evenmoe.slot_arrays import ascending_replica_index

_LAYER_IN_NAME = re.compile(r"(?:.*\.)?layers\.([0-9]{1,6})(?:\..*)?")


def slot_rows(document: Document, value: Value, where: str) -> list[IntArray]:
    """Integers (L, P), or L rows of different lengths, which `check` names."""
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.size:
        return list(document.numbers(value, where, (2,), integers=True))
    if isinstance(value, list) and value and all(isinstance(row, np.ndarray) and row.ndim == 1 for row in value):
        return [
            document.numbers(row, f"{where}[{layer}]", (1,), integers=True) if row.size else row.astype(np.int64)
            for layer, row in enumerate(value)
        ]
    document.numbers(value, where, (2,), integers=True)  # says what is there instead
    raise document.error(f"with {where} that is empty", "must have a row per layer", "check how it was written")


def numbered_rows(document: Document, value: Value, where: str) -> tuple[dict[int, IntArray], bool]:
    """{layer: slots} in ascending order, from keys like 3, "3" or "model.layers.3.mlp"; whether any was such a name."""
    if not isinstance(value, Mapping) or not value:
        raise document.error(f"without layers in {where}", "must map layers to slots", "check how it was written")
    rows: dict[int, IntArray] = {}
    named = False
    for key, row in value.items():
        number = layer_number(key)
        if number is None or number in rows:
            raise document.error(
                f"with the key {str(key)[:40]!r} in {where}", "must have a layer's number as key, once", "correct it"
            )
        named = named or (isinstance(key, str) and not key.isdigit())
        rows[number] = document.numbers(row, f"{where}, layer {number}", (1,), integers=True)
    return dict(sorted(rows.items())), named


def layer_number(key: Value) -> int | None:
    """The layer that a key names, None where it names none."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key if 0 <= key < 10**6 else None
    if not isinstance(key, str):
        return None
    if key.isascii() and key.isdigit() and len(key) <= 6:
        return int(key)
    match = _LAYER_IN_NAME.fullmatch(key)
    return int(match.group(1)) if match else None


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
        raise document.error(
            f"with counts of {per_slot.shape[1]} layers and {per_slot.shape[2]} slots",
            f"must fit its placement's {slots.shape[0]} layers and {slots.shape[1]} slots",
            "give the placement that was in use when it was recorded",
        )
    experts = num_experts or int(slots.max()) + 1
    wrong = np.argwhere((slots < 0) | (slots >= min(experts, slots.shape[1])))
    if len(wrong):
        layer, slot = wrong[0].tolist()
        raise document.error(
            f"with expert {slots[layer, slot]} in layer {layer}, slot {slot} of its placement",
            f"must place experts 0 to {min(experts, slots.shape[1]) - 1}",
            "check the placement",
        )
    # Before anything is allocated: a number of experts may be any.
    if per_slot.itemsize * len(per_slot) * per_slot.shape[1] * experts > 9 * per_slot.nbytes + ALLOWANCE_BYTES:
        raise document.error(f"read with {experts} experts", "must have a slot for each", "check --experts")
    logical = np.zeros((*per_slot.shape[:2], experts), per_slot.dtype)
    with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and found as such
        for layer, row in enumerate(slots):
            np.add.at(logical[:, layer].T, row, per_slot[:, layer].T)
    return logical


def one_window(load: Load, options: WriteOptions) -> Load:
    """(L, E): the windows summed, for a format that holds one.

    Raises ConstraintError where the sums are beyond int64 or float64.
    """
    if len(load) > 1:
        options.notes.append(f"summed {len(load)} windows: the format holds one")
    most = 2.0**63 if load.dtype.kind == "i" else np.inf
    with np.errstate(over="ignore"):
        beyond = load.sum(axis=0, dtype=np.float64) >= most
    if beyond.any():
        layer, expert = np.argwhere(beyond)[0].tolist()
        raise ConstraintError(
            "value",
            f"{len(load)} windows that add up to {'2**63' if most < np.inf else '1.8e308'} or more tokens in layer "
            f"{layer}, expert {expert}",
            f"must have sums that fit {load.dtype}, for the format holds one window",
            "write fewer windows, or divide the load",
        )
    return load.sum(axis=0)


def whole_counts(load: Load, format: str) -> IntArray:
    """The load as int64, for a format that holds integers.

    Raises ConstraintError where a count is no whole number, or beyond int64.
    """
    if load.dtype.kind == "f" and load.max(initial=0) >= 2.0**63:
        index = np.unravel_index(int(load.argmax()), load.shape)
        raise ConstraintError(
            "value",
            f"{load.max():.6g} at {tuple(int(i) for i in index)}",
            f"must be below 2**63 for {format}, which holds integers",
            "divide the load",
        )
    counts = load.astype(np.int64)
    if load.dtype.kind == "f" and (counts != load).any():
        index = tuple(int(i) for i in np.argwhere(counts != load)[0])
        raise ConstraintError(
            "value", f"{load[index]} at {index}", f"must hold whole numbers for {format}", "round the load"
        )
    return counts


def smallest_counts(counts: IntArray, options: WriteOptions) -> np.ndarray:
    """The counts in int32, as recorders write them, or in int64 where one does not fit."""
    if counts.max(initial=0) < 2**31:
        return counts.astype(np.int32)
    options.notes.append("wrote int64: a count does not fit int32")
    return counts


def slots_of(value: Placement, options: WriteOptions) -> np.ndarray:
    """int32 (L, P); notes what is lost where replicas are not in ascending order."""
    if not np.array_equal(ascending_replica_index(value.slot_to_expert), value.replica_index):
        options.notes.append("left out the order of replicas, which the format does not hold: ascending slots")
    return value.slot_to_expert


def slots_by_rank(value: Placement, format: str, options: WriteOptions) -> np.ndarray:
    """As `slots_of`, int32 (L, ranks, slots of a rank), for a format that holds an expert at most once on a rank.

    Raises ConstraintError where one is there twice.
    """
    slots = slots_of(value, options).reshape(value.num_layers, value.num_ranks, value.slots_per_rank)
    ordered = np.sort(slots, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if len(twice):
        layer, rank, position = twice[0].tolist()
        raise ConstraintError(
            "value",
            f"a placement with expert {ordered[layer, rank, position]} twice on rank {rank} in layer {layer}",
            f"must hold an expert at most once on a rank for {format}",
            "give one of the slots to another expert, or use another format",
        )
    return slots


def array_bytes(array: np.ndarray, container: str) -> bytes:
    """`array` as a .pt of one tensor, or as .npy."""
    return _torch_bytes(array) if container == "pt" else npy_bytes(array)


def arrays_bytes(arrays: dict[str, np.ndarray], container: str) -> bytes:
    """Named arrays as a .pt dictionary, or as .npz."""
    return _torch_bytes(arrays) if container == "pt" else npz_bytes(arrays, compress=False)


def named_bytes(content: dict[str, Value], container: str) -> bytes:
    """Named arrays, numbers and texts as a .pt dictionary, or as a JSON object."""
    if container == "pt":
        return _torch_bytes(content)
    return json_bytes(content)


def _torch_bytes(value: Value) -> bytes:
    from evenmoe.io.torch_file import torch_bytes  # not at the top: files without tensors need no reader of pickles

    return torch_bytes(value)
