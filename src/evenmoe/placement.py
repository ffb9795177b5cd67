"""`Placement`: which logical expert each slot holds, for every layer; an immutable value that checks itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

IntArray = npt.NDArray[np.int32]
# Slots looked at together, for what is made of them takes several times their memory, and a file may claim any number.
_PART = 1 << 15


class Placement:
    """The experts that every slot of every rank holds, layer by layer.

    Slot `s` lives on rank `s // (S / num_ranks)` where the ranks share the slots evenly; `rank_sizes` says otherwise.
    Two placements are equal when all their arrays are.

    Args:
        slot_to_expert: integers (L, S), the logical expert 0…E−1 that each slot holds. Copied.
        num_ranks: ranks that share the S slots, evenly unless `rank_sizes` are given.
        num_experts: E, logical experts per layer. Default: the largest id + 1.
        replica_index: integers (L, S) or None: the position, from 0, of each slot in its expert's EPLB table row.
            It decides which ranks reach which replica under the `rank` rule. Default: by ascending slot.
        rank_sizes: the number of slots of each rank, in slot order, adding up to S; the same in all layers. 0 is a rank
            that holds no expert, such as a dead one. Default: S / num_ranks each.

    Raises:
        ConstraintError: shapes that do not fit, an id outside 0…E−1, an expert without a slot, slots that do not
            divide by the ranks, sizes that do not add up, or a `replica_index` that does not count 0, 1, … over each
            expert's slots.

    Two ranks with two slots each; expert 0 is held twice, so its table row counts 2 and names slots 0 and 2:

    >>> placement = Placement([[0, 1, 0, 2]], num_ranks=2)
    >>> placement.num_replicas.tolist()
    [[2, 1, 1]]
    >>> placement.eplb_table(0).tolist()
    [[2, 0, 2], [1, 1, 0], [1, 3, 0]]

    Three slots on rank 0 and two on rank 2; rank 1 holds nothing:

    >>> Placement([[0, 1, 2, 0, 3]], num_ranks=3, rank_sizes=[3, 0, 2])
    Placement(layers=1, experts=4, slots=5, ranks=3, rank_sizes=[3, 0, 2])
    """

    __slots__ = ("__dict__", "num_experts", "num_ranks", "rank_sizes", "replica_index", "slot_to_expert")

    slot_to_expert: IntArray
    num_ranks: int
    num_experts: int
    replica_index: IntArray
    rank_sizes: tuple[int, ...]

    def __init__(
        self,
        slot_to_expert: npt.ArrayLike,
        num_ranks: int,
        *,
        num_experts: int | None = None,
        replica_index: npt.ArrayLike | None = None,
        rank_sizes: Sequence[int] | npt.NDArray[np.integer] | None = None,
    ) -> None:
        slots = _integers("slot_to_expert", slot_to_expert)
        if slots.ndim != 2 or slots.size == 0:
            raise ConstraintError(
                "slot_to_expert",
                f"an array of shape {slots.shape}",
                "must be (layers, slots), neither zero",
                "pass one row per layer",
            )
        sizes = _checked_sizes(rank_sizes, num_ranks, slots.shape[1])
        if num_experts is None:
            num_experts = int(slots.max()) + 1
        if slots.min() < 0 or slots.max() >= num_experts:
            layer, slot = (int(i) for i in np.argwhere((slots < 0) | (slots >= num_experts))[0])
            raise ConstraintError(
                "slot_to_expert",
                f"{slots[layer, slot]} in layer {layer}, slot {slot}",
                f"must be a logical expert, 0 to {num_experts - 1}",
                "give every slot an expert of the model",
            )
        homeless = _without_slot(slots, num_experts)
        if homeless.size:
            layer, expert = (int(i) for i in homeless[0])
            raise ConstraintError(
                "slot_to_expert",
                f"without expert {expert} in layer {layer}",
                "must give every logical expert a slot",
                "a token routed to that expert would have nowhere to go: add a slot for it",
            )
        _set(self, "slot_to_expert", _frozen(slots))
        _set(self, "num_ranks", int(num_ranks))
        _set(self, "num_experts", int(num_experts))
        _set(self, "rank_sizes", sizes)
        ascending = ascending_replica_index(self.slot_to_expert)
        if replica_index is None:
            order = _read_only(ascending)
        else:
            order = _integers("replica_index", replica_index)
            if order.shape != slots.shape:
                raise ConstraintError(
                    "replica_index",
                    f"an array of shape {order.shape}",
                    f"must have the shape of slot_to_expert, {slots.shape}",
                    "pass one position per slot, or None",
                )
            _check_replica_index(slots, order, ascending)
            order = _frozen(order)
        _set(self, "replica_index", order)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Placement is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Placement is immutable: cannot delete {name!r}")

    @property
    def num_layers(self) -> int:
        return self.slot_to_expert.shape[0]

    @property
    def num_slots(self) -> int:
        return self.slot_to_expert.shape[1]

    @property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of slots."""
        return min(self.rank_sizes) == max(self.rank_sizes)

    @property
    def slots_per_rank(self) -> int:
        """Slots of every rank.

        Raises:
            ConstraintError: not every rank has as many; `rank_sizes` says how many each has.
        """
        if not self.is_even:
            raise ConstraintError(
                "placement",
                f"one whose ranks have {sizes_text(self.rank_sizes)} slots",
                "must have the same number of slots on every rank here",
                "plan with one number of slots for all ranks, and without dead ranks",
            )
        return self.rank_sizes[0]

    @cached_property
    def slot_to_rank(self) -> npt.NDArray[np.int64]:
        """int64 (S,): the rank of each slot, ascending.

        >>> Placement([[0, 1, 2, 0, 3]], num_ranks=3, rank_sizes=[3, 0, 2]).slot_to_rank.tolist()
        [0, 0, 0, 2, 2]
        """
        return ranks_of_slots(self.rank_sizes)

    @cached_property
    def held(self) -> npt.NDArray[np.bool_]:
        """Bool (L, G, E): whether each rank holds each logical expert.

        >>> Placement([[0, 1, 2, 0, 3]], num_ranks=3, rank_sizes=[3, 0, 2]).held.sum(axis=2).tolist()
        [[3, 0, 2]]
        """
        held = np.zeros((self.num_layers, self.num_ranks, self.num_experts), bool)
        held[np.arange(self.num_layers)[:, None], self.slot_to_rank, self.slot_to_expert] = True
        held.flags.writeable = False
        return held

    @cached_property
    def num_replicas(self) -> IntArray:
        """int32 (L, E): how many slots hold each logical expert."""
        return _frozen(count_replicas(self.slot_to_expert, self.num_experts))

    def eplb_table(self, layer: int) -> torch.Tensor:
        """The operator's table of one layer: torch.int32 (E, F), row `e` = [count, slot ids…, 0 padding].

        F = 1 + the largest replica count of any layer, so all layers of a placement share one shape.

        Raises:
            ConstraintError: ranks with different numbers of slots, which the operators do not know.
        """
        import torch  # not at the top: planning and `--help` need no torch

        return torch.from_numpy(self.eplb_array(layer))

    def eplb_array(self, layer: int) -> IntArray:
        """As `eplb_table`, for numpy: int32 (E, F).

        >>> Placement([[0, 1, 0, 2]], num_ranks=2).eplb_array(0).tolist()
        [[2, 0, 2], [1, 1, 0], [1, 3, 0]]
        """
        _ = self.slots_per_rank  # whoever uses a table takes slot s for one of rank s // (S / ranks)
        table = np.zeros((self.num_experts, 1 + int(self.num_replicas.max())), np.int32)
        table[:, 0] = self.num_replicas[layer]
        table[self.slot_to_expert[layer], 1 + self.replica_index[layer]] = np.arange(self.num_slots, dtype=np.int32)
        return table

    def save(self, path: str | Path, format: str = "evenmoe-placement") -> None:
        """Write the placement to a file; see `evenmoe.save_placement`."""
        from evenmoe import save_placement  # formats stand above placements, so only the package itself knows them

        save_placement(self, path, format=format)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.rank_sizes == other.rank_sizes
            and self.num_experts == other.num_experts
            and np.array_equal(self.slot_to_expert, other.slot_to_expert)
            and np.array_equal(self.replica_index, other.replica_index)
        )

    def __hash__(self) -> int:
        return hash((self.rank_sizes, self.num_experts, self.slot_to_expert.tobytes(), self.replica_index.tobytes()))

    def __repr__(self) -> str:
        uneven = "" if self.is_even else f", rank_sizes=[{sizes_text(self.rank_sizes)}]"
        return (
            f"Placement(layers={self.num_layers}, experts={self.num_experts}, "
            f"slots={self.num_slots}, ranks={self.num_ranks}{uneven})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.slot_to_expert, self.num_experts, self.replica_index, self.rank_sizes)


def default_placement(num_layers: int, num_experts: int, num_ranks: int, num_slots: int | None = None) -> Placement:
    """Slot `s` holds expert `s` mod E in every layer: what a model runs with before anything is balanced.

    `num_slots` is E unless it is given.

    >>> default_placement(1, 4, num_ranks=2).slot_to_expert.tolist()
    [[0, 1, 2, 3]]
    >>> default_placement(1, 4, num_ranks=2, num_slots=6).slot_to_expert.tolist()
    [[0, 1, 2, 3, 0, 1]]
    """
    row = np.arange(num_slots or num_experts, dtype=np.int32) % num_experts
    return Placement(np.tile(row, (num_layers, 1)), num_ranks, num_experts=num_experts)


def layers_of(placement: Placement, layers: Sequence[int] | npt.NDArray[np.int64]) -> Placement:
    """The placement of these layers alone, by row, in the given order.

    >>> layers_of(Placement([[0, 1], [1, 0]], num_ranks=2), [1]).slot_to_expert.tolist()
    [[1, 0]]
    """
    return Placement(
        placement.slot_to_expert[layers],
        placement.num_ranks,
        num_experts=placement.num_experts,
        replica_index=placement.replica_index[layers],
        rank_sizes=placement.rank_sizes,
    )


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


def _rebuild(slots: IntArray, num_experts: int, order: IntArray, sizes: tuple[int, ...]) -> Placement:
    return Placement(slots, len(sizes), num_experts=num_experts, replica_index=order, rank_sizes=sizes)


def _checked_sizes(given: object, num_ranks: int, num_slots: int) -> tuple[int, ...]:
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
    sizes = _integers("rank_sizes", given)  # pyright: ignore[reportArgumentType]
    if sizes.shape != (num_ranks,) or (sizes < 0).any() or sizes.sum() != num_slots:
        shown = sizes_text(sizes.tolist()) if sizes.ndim == 1 else f"of shape {sizes.shape}"
        raise ConstraintError(
            "rank_sizes",
            f"[{shown}]",
            f"must give each of the {num_ranks} ranks 0 slots or more, {num_slots} together",
            "count the slots of each rank",
        )
    return tuple(sizes.tolist())


def _set(placement: Placement, name: str, value: object) -> None:
    object.__setattr__(placement, name, value)


def _frozen(array: npt.NDArray[np.integer]) -> IntArray:
    return _read_only(np.array(array, np.int32, order="C"))


def _read_only(frozen: IntArray) -> IntArray:
    frozen.flags.writeable = False
    return frozen


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.integer]:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ConstraintError(
            name, f"of dtype {array.dtype}", "must hold integers", "convert it with .astype(np.int32)"
        )
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def _without_slot(slots: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.integer]:
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


def _check_replica_index(
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
