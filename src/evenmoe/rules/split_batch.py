"""The best split of one batch: how many tokens each replica should take so that the busiest rank has the fewest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, UnsupportedTypeError, as_integer, require
from evenmoe.metrics import as_array
from evenmoe.slot_arrays import ranks_of_slots

IntArray = npt.NDArray[np.int64]

_MOST_TOKENS = 2.0**62
_MOST_WEIGHT_ROWS = 1 << 40  # times a million experts, sums still fit int64


class SplitPlan:
    """A placement made ready for splitting: find the ranks that hold every expert once, split every batch.

    Args:
        slot_to_expert: integers (S,), or (L, S) for several layers: the logical expert that each slot holds.
        num_ranks: ranks that share the S slots, evenly unless `rank_sizes` are given.
        num_experts: E, logical experts per layer. Default: the largest id + 1.
        rank_sizes: slots of each rank, as in `Placement`.

    Raises:
        UnsupportedTypeError: `slot_to_expert` does not hold integers.
        ConstraintError: a wrong shape, slots that do not divide by the ranks, an id outside 0…E−1.

    >>> plan = SplitPlan([0, 1, 0, 2], num_ranks=2)
    >>> plan.split([6, 1, 3]).tolist(), plan.split([6, 9, 0]).tolist()
    ([4, 1, 2, 3], [0, 9, 6, 0])
    """

    __slots__ = ("_graphs", "num_experts", "num_ranks", "shape")

    def __init__(
        self,
        slot_to_expert: object,
        num_ranks: int,
        num_experts: int | None = None,
        *,
        rank_sizes: Sequence[int] | None = None,
    ) -> None:
        slots = _integers("slot_to_expert", slot_to_expert)
        if slots.ndim not in (1, 2) or slots.size == 0:
            raise ConstraintError(
                "slot_to_expert",
                f"an array of shape {slots.shape}",
                "must be (slots,) or (layers, slots), neither zero",
                "pass the logical expert of every slot",
            )
        if rank_sizes is None and (num_ranks < 1 or slots.shape[-1] % num_ranks):
            raise ConstraintError(
                "num_ranks",
                num_ranks,
                f"must divide the {slots.shape[-1]} slots evenly",
                "every rank has the same number of slots",
            )
        if num_experts is None:
            num_experts = int(slots.max()) + 1
        from evenmoe.rules import split_kernels  # not at the top: importing numba takes 0.3 s

        self.num_ranks = int(num_ranks)
        self.num_experts = num_experts
        self.shape = slots.shape
        sizes = rank_sizes or (self.shape[-1] // self.num_ranks,) * self.num_ranks
        layers, ranks = slots.reshape(-1, self.shape[-1]), ranks_of_slots(sizes)
        self._graphs = split_kernels.graphs_of(layers, ranks, self.num_ranks, num_experts)
        if not self._graphs.size:
            raise ConstraintError(
                "slot_to_expert",
                f"with ids from {slots.min()} to {slots.max()}",
                f"must hold logical experts, 0 to {num_experts - 1}",
                "pass as many entries in `num_tokens` as there are experts",
            )

    def split(self, num_tokens: object, *, weight_rows: int = 0) -> IntArray:
        """Tokens per slot for one batch; see `split_batch`. `num_tokens` is (E,), or (L, E) if there are layers."""
        return self._split(num_tokens, checked_weight_rows(weight_rows))

    def _split(self, num_tokens: object, weight_rows: int) -> IntArray:
        from evenmoe.rules import decode_kernels, split_kernels

        tokens = _integers("num_tokens", num_tokens)
        expected = (*self.shape[:-1], self.num_experts)
        if tokens.shape != expected:
            raise ConstraintError(
                "num_tokens",
                f"an array of shape {tokens.shape}",
                f"must have shape {expected}",
                "pass the tokens of every logical expert, over all ranks",
            )
        per_slot = np.empty(self.shape, np.int64)
        batch, filled = tokens.reshape(-1, self.num_experts), per_slot.reshape(-1, self.shape[-1])
        if weight_rows:
            wrong = decode_kernels.split_decode(batch, self._graphs, self.num_ranks, weight_rows, filled)
        else:
            wrong = split_kernels.split_layers(batch, self._graphs, self.num_ranks, filled)
        if wrong >= 0:
            _refuse(tokens, wrong)
        return per_slot

    def split_load(self, load: npt.NDArray[np.float64], *, weight_rows: int = 0) -> npt.NDArray[np.float64]:
        """Tokens per slot for loads that need not be whole tokens, such as a mean: float64 (…, L, E) -> (…, L, S).

        Loads are cut to about 2⁻⁵⁰ of the layer's total, by a power of two, so that whole tokens stay whole; with
        weights, of the largest total that a layer has and all its weights, in one unit for all.
        """
        total = load.sum(axis=-1, keepdims=True)
        if weight_rows:
            total = np.full_like(total, total.max() + float(weight_rows) * self.num_experts)
        unit = np.exp2(np.frexp(total)[1] - 50.0)
        quanta = np.rint(load / unit).astype(np.int64)
        windows = quanta.reshape(-1, *self.shape[:-1], self.num_experts)
        weights = max(1, round(weight_rows / float(unit.flat[0]))) if weight_rows else 0
        per_slot = np.stack([self._split(window, weights) for window in windows])
        return per_slot.reshape(*load.shape[:-1], self.shape[-1]) * unit


def split_batch(num_tokens: object, slot_to_expert: object, num_ranks: int, *, weight_rows: int = 0) -> IntArray:
    """Split one batch over the replicas so that the peak rank load, then every lower one in turn, is least.

    The result is exact in integers: no other split has a lower peak, nor, with the same peak, a lower second-highest
    rank load, and so on. It depends on the arguments alone, so all ranks that know the same counts get the same
    split. For many batches on one placement, make a `SplitPlan` once.

    In decode a rank has few rows of each expert, and reading the experts' weights takes it longer than computing the
    rows. With `weight_rows` a rank costs that many rows for every expert that it has any row of, and its rows on top;
    the split makes the costliest rank cost little, which leaves replicas idle. That is a search: the peak is never
    above the best with one replica an expert for the number of experts read, and seldom above the least there is.

    Args:
        num_tokens: integers (E,), or (L, E): tokens of this batch per logical expert over all ranks. Their sum per
            layer must stay below 2⁶².
        slot_to_expert: integers (S,), or (L, S): the logical expert that each slot holds; slot s is on rank
            s // (S / G).
        num_ranks: G.
        weight_rows: rows that take a rank as long to compute as the weights of one expert take to read, 0 to 2⁴⁰; 0
            leaves the weights out. About 150 on an H100, 35 on an H20.

    Returns:
        int64 (S,) or (L, S): tokens per slot; the slots of an expert add up to its tokens.

    Raises:
        UnsupportedTypeError: an array that does not hold integers.
        ConstraintError: a wrong shape, a negative entry, too many tokens, tokens of an expert that has no slot,
            `weight_rows` out of range.

    Method: water-filling, then exact improvement along chains of replicas; see `rules/split_kernels.py`. With weights:
    `rules/decode_kernels.py`.

    Expert 0 has a replica on both ranks; 4 + 1 tokens here and 2 + 3 there is even:

    >>> split_batch([6, 1, 3], [0, 1, 0, 2], num_ranks=2).tolist()
    [4, 1, 2, 3]

    Where the weights of an expert are worth 10 rows, this is still best: either rank reads two experts and costs
    20 + 5, and with expert 0 on rank 0 alone that costs 20 + 7. Once expert 1 has no rows, ranks that read one expert
    each cost 16 and 13:

    >>> split_batch([6, 1, 3], [0, 1, 0, 2], num_ranks=2, weight_rows=10).tolist()
    [4, 1, 2, 3]
    >>> split_batch([6, 0, 3], [0, 1, 0, 2], num_ranks=2, weight_rows=10).tolist()
    [6, 0, 0, 3]
    """
    weights = checked_weight_rows(weight_rows)
    tokens = _integers("num_tokens", num_tokens)
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ConstraintError(
            "num_tokens",
            f"an array of shape {tokens.shape}",
            "must be (experts,) or (layers, experts)",
            "pass the tokens of every logical expert, over all ranks",
        )
    if tokens.sum(axis=-1, dtype=np.float64).max() + float(weights) * tokens.shape[-1] >= _MOST_TOKENS:
        raise ConstraintError(
            "num_tokens",
            f"an array of up to {tokens.max()}",
            "must hold fewer than 2**62 tokens in a layer, the weights' worth included, so that their sums are exact",
            "check how they were counted",
        )
    return SplitPlan(slot_to_expert, num_ranks, tokens.shape[-1]).split(tokens, weight_rows=weights)


def checked_weight_rows(weight_rows: object) -> int:
    """The rows that an expert's weights are worth, as an int.

    Raises:
        ConstraintError: no whole number from 0 to 2**40.

    >>> checked_weight_rows(150)
    150
    """
    fix = "pass the whole rows that one expert's weights are worth, 150 on an H100, or 0 to leave them out"
    rows = as_integer("weight_rows", weight_rows, fix)
    require(0 <= rows <= _MOST_WEIGHT_ROWS, "weight_rows", rows, "must be from 0 to 2**40", fix)
    return rows


def _integers(name: str, values: object) -> IntArray:
    try:
        array = as_array(values)
    except Exception as error:  # what torch and numpy raise for what is no array: five types at least
        reason = " ".join(str(error).split())[:80]
        raise UnsupportedTypeError(
            name, f"a {type(values).__name__} that is no array ({reason})", "must hold integers", "pass int64"
        ) from None
    if array.dtype.kind not in "iu" and array.size:
        dtype = str(getattr(values, "dtype", array.dtype)).removeprefix("torch.")
        raise UnsupportedTypeError(name, f"of dtype {dtype}", "must hold integers", "convert it with .astype(np.int64)")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ConstraintError(name, f"an array of up to {array.max()}", "must fit int64", "check for an overflow")
    return np.asarray(array, np.int64, order="C")


def _refuse(tokens: IntArray, index: int) -> None:
    value, expert = int(tokens.flat[index]), index % tokens.shape[-1]
    if value < 0:
        raise ConstraintError(
            "num_tokens", f"{value} for expert {expert}", "must not be negative", "pass counts of tokens"
        )
    raise ConstraintError(
        "slot_to_expert",
        f"without expert {expert}",
        f"must hold every expert that has tokens, and expert {expert} has {value}",
        "give that expert a slot",
    )
