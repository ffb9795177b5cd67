"""Plans as arrays, while they are made: relabeled by load, judged, and laid over the placement in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, peak_over_mean, sum_by_rank, within_range
from evenmoe.slot_arrays import IntArray, ascending_replica_index, count_replicas, held_by_rank

Indices = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Padding:
    """Ranks of different numbers of slots as ranks of one: what is missing holds experts without load that never move.

    Each of these `num_fixed` experts has one slot, and an id from E on. Where all ranks have as many, there are none.

    >>> padding = Padding((2, 1), num_experts=3)
    >>> padding.slots(np.array([[0, 1, 2]])).tolist(), padding.load(np.ones((1, 3))).tolist()
    ([[0, 1, 2, 3]], [[1.0, 1.0, 1.0, 0.0]])
    >>> padding.strip(np.array([[1, 2, 3, 0]])).tolist()
    [[1, 2, 0]]
    """

    rank_sizes: tuple[int, ...]
    num_experts: int

    @property
    def width(self) -> int:
        """Slots of every rank, with the padding."""
        return max(self.rank_sizes)

    @property
    def num_slots(self) -> int:
        """Slots of all ranks, with the padding."""
        return self.width * len(self.rank_sizes)

    @property
    def num_fixed(self) -> int:
        """Experts that stand for missing slots."""
        return self.num_slots - sum(self.rank_sizes)

    def load(self, load: FloatArray) -> FloatArray:
        """(…, E) -> (…, E + fixed)."""
        return np.concatenate([load, np.zeros((*load.shape[:-1], self.num_fixed))], axis=-1) if self.num_fixed else load

    def slots(self, slots: Integers) -> Integers:
        """Slots (L, S) -> (L, G × width); the fixed experts come last on their rank."""
        if not self.num_fixed:
            return slots
        padded = np.empty((len(slots), len(self.rank_sizes), self.width), slots.dtype)
        real = np.arange(self.width) < np.array(self.rank_sizes)[:, None]
        padded[:, real] = slots
        padded[:, ~real] = self.num_experts + np.arange(self.num_fixed)
        return padded.reshape(len(slots), -1)

    def strip(self, slots: Integers) -> Integers:
        """The reverse of `slots`, wherever the fixed experts are on their rank."""
        return slots[slots < self.num_experts].reshape(len(slots), sum(self.rank_sizes)) if self.num_fixed else slots

    def held(self, held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """What ranks hold, (L, G, E) -> (L, G, E + fixed); the fixed ones cost nothing, as if all had them."""
        return np.pad(held, ((0, 0), (0, 0), (0, self.num_fixed)), constant_values=True)


@dataclass(frozen=True)
class Slots:
    """What a placement is made of: the expert of each slot (L, S), and as which of its replicas, if that matters."""

    experts: Integers
    given_index: Integers | None = None

    @cached_property
    def replica_index(self) -> Integers:
        """(L, S): the position of each slot in its expert's row of the EPLB table; ascending unless it was given."""
        return ascending_replica_index(self.experts) if self.given_index is None else self.given_index

    def of_layers(self, layers: Indices) -> Slots:
        """The slots of these layers alone."""
        return Slots(self.experts[layers], self.replica_index[layers])


def random_state(seed: int, stream: int, more: int = 0) -> npt.NDArray[np.uint64]:
    """A state for the searches' random numbers, uint64 (1,), far from that of the next seed and stream."""
    return np.array([(seed * 0x9E3779B97F4A7C15 + stream * 0x2545F4914F6CDD1D + more) % 2**64 or 1], np.uint64)


def by_load(load: FloatArray) -> Indices:
    """int64 (L, E): experts in descending order of mean load, so that no plan depends on what they are called."""
    return np.argsort(-(load.mean(axis=0) if load.ndim == 3 else load), axis=1, kind="stable")


def take(load: FloatArray, order: Indices) -> FloatArray:
    """The load, (L, E) or (T, L, E), with the experts in this order (L, E)."""
    return np.take_along_axis(load, np.broadcast_to(order, load.shape), axis=-1)


def named(slots: Integers, order: Indices) -> IntArray:
    """Slots of positions in `order` (L, E) -> slots of experts, int32 (L, S).

    >>> named(np.array([[0, 1, 2, 0]]), np.array([[2, 0, 1]])).tolist()
    [[2, 0, 1, 2]]
    """
    return np.take_along_axis(order, slots, axis=1).astype(np.int32)


def positions(slots: Integers, order: Indices) -> Indices:
    """The reverse of `named`, int64 (L, S)."""
    return np.take_along_axis(np.argsort(order, axis=1), slots, axis=1)


def histories(load: FloatArray) -> Iterator[tuple[FloatArray, Indices]]:
    """The layers of windows (T, L, E) that have tokens in the same windows: these windows (T', L', E) and layers (L',).

    Means over windows would otherwise count a window without tokens as an even one.

    >>> [(part.tolist(), layers.tolist()) for part, layers in histories(np.array([[[1.0], [0.0]], [[2.0], [4.0]]]))]
    [([[[4.0]]], [1]), ([[[1.0]], [[2.0]]], [0])]
    """
    seen = load.any(axis=2).T
    seen[~seen.any(axis=1)] = True
    windows, which = np.unique(seen, axis=0, return_inverse=True)
    for number, recorded in enumerate(windows):
        layers = np.flatnonzero(which.reshape(-1) == number)
        yield load[recorded][:, layers], layers


def normalized(windows: FloatArray, num_ranks: int) -> FloatArray:
    """Windows (T, E) of one layer, none without load, in mean rank loads.

    >>> normalized(np.array([[6.0, 2.0]]), 2).tolist()
    [[1.5, 0.5]]
    """
    return np.ascontiguousarray(windows * (num_ranks / windows.sum(axis=1, keepdims=True)))


def even_par(windows: FloatArray, slots: Integers, num_ranks: int, sizes: Sequence[int] | None = None) -> FloatArray:
    """As `peak_to_average` for windows (T, L, E) and slots (L, S), of ranks with so many slots: float64 (T, L)."""
    tokens = within_range(windows.reshape(-1, windows.shape[-1])).reshape(windows.shape)
    sizes = sizes or (slots.shape[1] // num_ranks,) * num_ranks
    return peak_over_mean(sum_by_rank(tokens / count_replicas(slots, windows.shape[-1]), slots, sizes))


def lay_over(
    new: Slots, used: Integers, num_ranks: int, num_nodes: int = 1, rank_sizes: Sequence[int] | None = None
) -> Slots:
    """Nodes are alike, and the ranks of one, so each of `new` is put where most of its experts are already.

    With `rank_sizes`, slots being padded, only ranks with as many slots are alike; there is one node then.

    >>> lay_over(Slots(np.array([[2, 3, 0, 1]])), np.array([[0, 1, 2, 3]]), 2).experts.tolist()
    [[0, 1, 2, 3]]
    """
    num_layers, num_slots = used.shape
    width, node_ranks = num_slots // num_ranks, num_ranks // num_nodes
    ranks = np.empty((num_layers, num_ranks), np.int64)  # the rank of `new` that each rank gets
    for layer, held in enumerate(held_by_rank(used, num_ranks, int(used.max()) + 1)):
        common = held[:, new.experts[layer].reshape(num_ranks, width)].sum(axis=2)
        if rank_sizes is not None:
            for size in set(rank_sizes):
                alike = np.flatnonzero(np.array(rank_sizes) == size)
                for rank, other in _best_pairs(common[np.ix_(alike, alike)]):
                    ranks[layer, alike[rank]] = alike[other]
            continue
        common = common.reshape(num_nodes, node_ranks, num_nodes, node_ranks)
        for node, taken in _best_pairs(common.sum(axis=(1, 3))):
            for rank, other in _best_pairs(common[node, :, taken]):
                ranks[layer, node * node_ranks + rank] = taken * node_ranks + other
    slots = (ranks[:, :, None] * width + np.arange(width)).reshape(num_layers, -1)
    return Slots(*(np.take_along_axis(each, slots, axis=1) for each in (new.experts, new.replica_index)))


def _best_pairs(common: Indices) -> list[tuple[int, int]]:
    """Every row with a column of its own, those that have most in common first.

    >>> _best_pairs(np.array([[1, 5], [3, 4]]))
    [(0, 1), (1, 0)]
    """
    rows, columns = np.nonzero(common)
    order = np.argsort(-common[rows, columns], kind="stable")
    column_of, row_of = [-1] * len(common), [-1] * len(common)
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if column_of[row] < 0 and row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    left = iter([column for column, row in enumerate(row_of) if row < 0])
    return [(row, next(left) if column < 0 else column) for row, column in enumerate(column_of)]


def swap_back(new: Slots, used: Integers, num_ranks: int) -> Slots:
    """The same slots with every expert that stays on its rank swapped into the slot where it was in `used` (L, S)."""
    slots, index = new.experts.copy(), new.replica_index.copy()
    width = slots.shape[1] // num_ranks
    for layer, before in enumerate(used):
        for slot in np.flatnonzero(slots[layer] != before):
            rank = slice(slot // width * width, (slot // width + 1) * width)
            there = np.flatnonzero((slots[layer, rank] == before[slot]) & (slots[layer, rank] != before[rank]))
            if there.size:
                pair, swapped = [slot, rank.start + there[0]], [rank.start + there[0], slot]
                slots[layer, pair] = slots[layer, swapped]
                index[layer, pair] = index[layer, swapped]
    return Slots(slots, index)
