"""What several writers do to a value before they write it."""

from __future__ import annotations

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import IntArray, Load, WriteOptions
from evenmoe.placement import Placement


def one_window(load: Load, options: WriteOptions) -> Load:
    """(L, E): the windows summed, for a format that holds one."""
    if len(load) > 1:
        options.notes.append(f"summed {len(load)} windows: the format holds one")
    return load.sum(axis=0)


def whole_counts(load: Load, format: str) -> IntArray:
    """The load as int64, for a format that holds integers.

    Raises ConstraintError where a count is no whole number.
    """
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
    ascending = Placement(value.slot_to_expert, value.num_ranks, num_experts=value.num_experts)
    if not np.array_equal(ascending.replica_index, value.replica_index):
        options.notes.append("left out the order of replicas, which the format does not hold: ascending slots")
    return value.slot_to_expert
