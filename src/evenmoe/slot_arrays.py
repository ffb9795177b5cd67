"""Slots as plain arrays: whose they are, what they hold, and the checks of both; `Placement` is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError

IntArray = npt.NDArray[np.int32]
# Slots looked at together, for what is made of them takes several times their memory, and a file may claim any number.
_PART = 1 << 15


def share_slots(num_slots: int, num_ranks: int) -> tuple[int, ...]:
    """Slots of each rank as even as they can be; where they do not divide, the first ranks have one more.

    >>> share_slots(34, 4)
    (9, 9, 8, 8)
    """
    return tuple(num_slots // num_ranks + (rank < num_slots % num_ranks) for rank in range(num_ranks))


def ranks_of_slots(rank_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 (S,): the rank of each slot, of ranks with so many slots.

    >>> ranks_of_slots([3, 0, 2]).tolist()
    [0, 0, 0, 2, 2]
    """
    return np.repeat(np.arange(len(rank_sizes)), rank_sizes)


def sizes_text(rank_sizes: Sequence[int]) -> str:
    """The slots of each rank as text, runs of equal ones shortened.

    >>> sizes_text([3, 0, 2]), sizes_text([9] * 4 + [8] * 4)
    ('3, 0, 2', '9 x4, 8 x4')
    """
    runs = [(size, len(list(run))) for size, run in groupby(rank_sizes)]
    return ", ".join(str(size) if length == 1 else f"{size} x{length}" for size, length in runs)


def count_replicas(slots: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.int64]:
    """How many of the slots (L, S) hold each expert, int64 (L, E).

    >>> count_replicas(np.array([[0, 1, 0, 2]]), 3).tolist()
    [[2, 1, 1]]
    """
    of_layer = np.arange(len(slots))[:, None] * num_experts
    return np.bincount((of_layer + slots).ravel(), minlength=len(slots) * num_experts).reshape(-1, num_experts)


def held_by_rank(slots: npt.NDArray[np.integer], num_ranks: int, num_experts: int) -> npt.NDArray[np.bool_]:
    """Which experts each rank holds in some slot, (L, S) -> bool (L, G, E).

    >>> held_by_rank(np.array([[0, 1, 0, 0]]), 2, 2).tolist()
    [[[True, True], [True, False]]]
    """
    held = np.zeros((len(slots), num_ranks, num_experts), bool)
    held[np.arange(len(slots))[:, None], np.arange(slots.shape[1]) * num_ranks // slots.shape[1], slots] = True
    return held


def ascending_replica_index(slots: npt.NDArray[np.integer]) -> IntArray:
    """Position of each slot among the slots of the same expert, counted from the left."""
    order = np.empty(slots.shape, np.int32)
    before = None  # (L, E), slots of each expert in the parts on the left
    begin = 0
    for part in _column_parts(slots):
        here = order[:, begin : begin + part.shape[1]]
        begin += part.shape[1]
        by_expert = np.argsort(part, axis=1, kind="stable")
        sorted_experts = np.take_along_axis(part, by_expert, axis=1)
        column = np.arange(part.shape[1])
        starts = np.ones(part.shape, bool)
        starts[:, 1:] = sorted_experts[:, 1:] != sorted_experts[:, :-1]
        first = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
        np.put_along_axis(here, by_expert, (column - first).astype(np.int32), axis=1)
        if part.shape[1] < slots.shape[1]:
            if before is None:
                before = np.zeros((len(slots), int(slots.max()) + 1), np.int32)
            here += np.take_along_axis(before, part, axis=1)
            before += count_replicas(part, before.shape[1]).astype(np.int32)
    return order


def integers_of(name: str, values: npt.ArrayLike) -> npt.NDArray[np.integer]:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ConstraintError(
            name, f"of dtype {array.dtype}", "must hold integers", "convert it with .astype(np.int32)"
        )
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def checked_sizes(given: object, num_ranks: int, num_slots: int) -> tuple[int, ...]:
    """The slots of each rank."""
    if given is None:
        if num_ranks < 1 or num_slots % num_ranks:
            fitting = [ranks for ranks in range(1, num_slots + 1) if num_slots % ranks == 0]
            raise ConstraintError(
                "num_ranks",
                num_ranks,
                f"must divide the {num_slots} slots evenly",
                f"use one of {fitting}, or a number of slots that divides",
            )
        return (num_slots // int(num_ranks),) * int(num_ranks)
    sizes = integers_of("rank_sizes", given)  # pyright: ignore[reportArgumentType]
    if sizes.shape != (num_ranks,) or (sizes < 0).any() or sizes.sum() != num_slots:
        shown = sizes_text(sizes.tolist()) if sizes.ndim == 1 else f"of shape {sizes.shape}"
        raise ConstraintError(
            "rank_sizes",
            f"[{shown}]",
            f"must give each of the {num_ranks} ranks 0 slots or more, {num_slots} together",
            "count the slots of each rank",
        )
    return tuple(sizes.tolist())


def check_replica_index(
    slots: npt.NDArray[np.integer], order: npt.NDArray[np.integer], ascending: npt.NDArray[np.integer]
) -> None:
    width = slots.shape[1] + 1
    wrong = (order < 0) | (order >= width)
    if not wrong.any():
        # The positions of one expert must be a permutation of 0…count−1: as multisets of (expert, position)
        # they must equal those of the ascending order.
        expert = slots.astype(np.int64) * width
        wrong = np.sort(expert + order, axis=1) != np.sort(expert + ascending, axis=1)
    if wrong.any():
        layer = int(np.argwhere(wrong)[0][0])
        raise ConstraintError(
            "replica_index",
            f"{order[layer].tolist()} in layer {layer}",
            "must number the slots of each expert 0, 1, … without gaps",
            "pass None for ascending slots",
        )


def experts_without_slot(slots: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.integer]:
    """(n, 2): layer and expert of those that no slot holds, empty when every expert has one."""
    # S slots leave out one of S + 1 experts, so no array is made for more of them, however large an id is.
    held = np.zeros((slots.shape[0], min(num_experts, slots.shape[1] + 1)), bool)
    for part in _column_parts(slots):
        layer, slot = np.nonzero(part < held.shape[1])
        held[layer, part[layer, slot]] = True
    return np.argwhere(~held)


def _column_parts(slots: npt.NDArray[np.integer]) -> Iterator[npt.NDArray[np.integer]]:
    """The columns of (L, S) in parts of at most 32,768 numbers, which a usual placement has."""
    width = max(1, _PART // len(slots))
    for begin in range(0, slots.shape[1], width):
        yield slots[:, begin : begin + width]
