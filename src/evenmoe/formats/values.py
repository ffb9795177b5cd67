"""What several writers do to a value before they write it."""

from __future__ import annotations

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import IntArray, Load, WriteOptions
from evenmoe.placement import Placement


def without_empty_windows(load: Load) -> tuple[Load, int]:
    """The windows (T, L, E) in which anything was recorded, and how many others there were; one is kept in any case.

    >>> load, empty = without_empty_windows(np.array([[[6, 2]], [[0, 0]]]))
    >>> load.tolist(), empty
    ([[[6, 2]]], 1)
    """
    recorded = (load != 0).any(axis=(1, 2))
    if not recorded.any():
        recorded[0] = True
    return (load, 0) if recorded.all() else (load[recorded], int((~recorded).sum()))


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
    ascending = Placement(value.slot_to_expert, value.num_ranks, num_experts=value.num_experts)
    if not np.array_equal(ascending.replica_index, value.replica_index):
        options.notes.append("left out the order of replicas, which the format does not hold: ascending slots")
    return value.slot_to_expert
