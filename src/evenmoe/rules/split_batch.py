"""The best split of one batch: how many tokens each replica should take so that the busiest rank has the fewest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.metrics import as_array
from evenmoe.slot_arrays import ranks_of_slots

IntArray = npt.NDArray[np.int64]

_MOST_TOKENS = 2.0**62


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

    def split(self, num_tokens: object) -> IntArray:
        """Tokens per slot for one batch; see `split_batch`. `num_tokens` is (E,), or (L, E) if there are layers."""
        from evenmoe.rules import split_kernels

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
        wrong = split_kernels.split_layers(
            tokens.reshape(-1, self.num_experts), self._graphs, self.num_ranks, per_slot.reshape(-1, self.shape[-1])
        )
        if wrong >= 0:
            _refuse(tokens, wrong)
        return per_slot

    def split_load(self, load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Tokens per slot for loads that need not be whole tokens, such as a mean: float64 (…, L, E) -> (…, L, S).

        Loads are cut to about 2⁻⁵⁰ of the layer's total, by a power of two, so that whole tokens stay whole.
        """
        total = load.sum(axis=-1, keepdims=True)
        unit = np.exp2(np.frexp(total)[1] - 50.0)
        quanta = np.rint(load / unit).astype(np.int64)
        windows = quanta.reshape(-1, *self.shape[:-1], self.num_experts)
        per_slot = np.stack([self.split(window) for window in windows])
        return per_slot.reshape(*load.shape[:-1], self.shape[-1]) * unit


def split_batch(num_tokens: object, slot_to_expert: object, num_ranks: int) -> IntArray:
    """Split one batch over the replicas so that the peak rank load, then every lower one in turn, is least.

    The result is exact in integers: no other split has a lower peak, nor, with the same peak, a lower second-highest
    rank load, and so on. It depends on the arguments alone, so all ranks that know the same counts get the same
    split. For many batches on one placement, make a `SplitPlan` once.

    Args:
        num_tokens: integers (E,), or (L, E): tokens of this batch per logical expert over all ranks. Their sum per
            layer must stay below 2⁶².
        slot_to_expert: integers (S,), or (L, S): the logical expert that each slot holds; slot s is on rank
            s // (S / G).
        num_ranks: G.

    Returns:
        int64 (S,) or (L, S): tokens per slot; the slots of an expert add up to its tokens.

    Raises:
        UnsupportedTypeError: an array that does not hold integers.
        ConstraintError: a wrong shape, a negative entry, too many tokens, tokens of an expert that has no slot.

    Method: water-filling, then exact improvement along chains of replicas; see `rules/split_kernels.py`.

    Expert 0 has a replica on both ranks; 4 + 1 tokens here and 2 + 3 there is even:

    >>> split_batch([6, 1, 3], [0, 1, 0, 2], num_ranks=2).tolist()
    [4, 1, 2, 3]
    """
    tokens = _integers("num_tokens", num_tokens)
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ConstraintError(
            "num_tokens",
            f"an array of shape {tokens.shape}",
            "must be (experts,) or (layers, experts)",
            "pass the tokens of every logical expert, over all ranks",
        )
    if tokens.sum(axis=-1, dtype=np.float64).max() >= _MOST_TOKENS:
        raise ConstraintError(
            "num_tokens",
            f"an array of up to {tokens.max()}",
            "must hold fewer than 2**62 tokens in a layer, so that their sums are exact",
            "check how they were counted",
        )
    return SplitPlan(slot_to_expert, num_ranks, tokens.shape[-1]).split(tokens)


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
