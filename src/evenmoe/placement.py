"""`Placement`: which logical expert each slot holds, for every layer; an immutable value that checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.slot_arrays import (
    IntArray,
    ascending_replica_index,
    check_replica_index,
    checked_sizes,
    count_replicas,
    experts_without_slot,
    integers_of,
    ranks_of_slots,
    sizes_text,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch


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
        slots = integers_of("slot_to_expert", slot_to_expert)
        if slots.ndim != 2 or slots.size == 0:
            raise ConstraintError(
                "slot_to_expert",
                f"an array of shape {slots.shape}",
                "must be (layers, slots), neither zero",
                "pass one row per layer",
            )
        sizes = checked_sizes(rank_sizes, num_ranks, slots.shape[1])
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
        homeless = experts_without_slot(slots, num_experts)
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
            order = integers_of("replica_index", replica_index)
            if order.shape != slots.shape:
                raise ConstraintError(
                    "replica_index",
                    f"an array of shape {order.shape}",
                    f"must have the shape of slot_to_expert, {slots.shape}",
                    "pass one position per slot, or None",
                )
            check_replica_index(slots, order, ascending)
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


def _rebuild(slots: IntArray, num_experts: int, order: IntArray, sizes: tuple[int, ...]) -> Placement:
    return Placement(slots, len(sizes), num_experts=num_experts, replica_index=order, rank_sizes=sizes)


def _set(placement: Placement, name: str, value: object) -> None:
    object.__setattr__(placement, name, value)


def _frozen(array: npt.NDArray[np.integer]) -> IntArray:
    return _read_only(np.array(array, np.int32, order="C"))


def _read_only(frozen: IntArray) -> IntArray:
    frozen.flags.writeable = False
    return frozen
