"""The EPLB table of one layer under one rule: which slot each entry of a batch goes to.

Shapes: E logical experts, S slots, W ranks, F columns of the table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.update_expert import check_table, prepare
from evenmoe.rules import batch, occurrence, shares
from evenmoe.rules.split_batch import SplitPlan

RULES = shares.RULES[1:]  # all but "even", which only a plan can assume
IntArray = npt.NDArray[np.int64]


class ReplicaChoice:
    """A table made ready for one rank.

    Args:
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care].
        rule: one of `RULES`.
        num_slots: S; slot ids are 0…S−1, each at most once in the table.
        rank, world_size: this rank, and W.

    Raises:
        UnsupportedTypeError, ConstraintError: naming the entry that cannot work.
    """

    def __init__(self, eplb_table: torch.Tensor, rule: str, num_slots: int, rank: int, world_size: int) -> None:
        if rule not in RULES:
            raise ConstraintError("rule", repr(rule), f"must be one of {', '.join(RULES)}", "choose one of them")
        check_tensors(eplb_table=eplb_table)
        shape = eplb_table.shape
        if eplb_table.dtype != torch.int32 or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise UnsupportedTypeError(
                "eplb_table",
                f"{eplb_table.dtype} of shape {tuple(shape)}",
                "must be torch.int32 (experts, 1 + the most replicas)",
                "use Placement.eplb_table(layer)",
            )
        check_table(eplb_table)
        # A copy, since it is read at every step, when its owner may have changed it.
        eplb_table = eplb_table.clone()
        self._table, self._rule, self._rank, self._world_size = eplb_table, rule, rank, world_size
        self._num_slots = num_slots
        host = eplb_table.cpu().numpy()
        counted = np.arange(1, host.shape[1]) <= host[:, :1]
        self._experts = np.nonzero(counted)[0]  # of every counted entry, in table order
        self._slots = host[:, 1:][counted]  # its slot
        self._check_slots()
        if rule == "batch":
            self._split = SplitPlan(self._slot_to_expert(), world_size, num_experts=host.shape[0])
        elif rule != "occurrence":
            self._prepared = prepare(eplb_table, rank, world_size, rule, check_values=False)

    def __call__(self, experts: torch.Tensor, counted: torch.Tensor, by_rank: IntArray | None) -> torch.Tensor:
        """Slots of a batch's entries.

        Args:
            experts: int32 or int64 (T, K), logical experts.
            counted: bool (T, K), entries that are really computed; the others get some slot.
            by_rank: int64 (W, E), counted entries of every rank; needed by, and only by, the batch rule.
        """
        if self._rule == "occurrence":
            return occurrence.choose(experts, self._table, self._rank, counted)
        if self._rule == "batch":
            assert by_rank is not None
            quotas = self._split.split(by_rank.sum(axis=0))
            return batch.choose(experts, self._table, quotas, by_rank, self._rank, counted)
        return self._prepared(experts)

    def slot_counts(self, by_rank: IntArray) -> IntArray:
        """Under the batch rule, entries that every rank sends to every slot: int64 (W, S).

        All ranks compute the same, since the split is exact in integers and a function of `by_rank` alone: rank r's
        entries of an expert and a slot's quota of them are two intervals of the same line; their overlap is sent.
        """
        quotas = self._split.split(by_rank.sum(axis=0))[self._slots]
        first_of_expert = np.searchsorted(self._experts, np.arange(by_rank.shape[1]))
        stop = np.cumsum(quotas)
        start = stop - quotas
        base = start[first_of_expert][self._experts]
        start, stop = start - base, stop - base
        rank_stop = np.cumsum(by_rank, axis=0)[:, self._experts]
        rank_start = rank_stop - by_rank[:, self._experts]
        counts = np.zeros((self._world_size, self._num_slots), np.int64)
        counts[:, self._slots] = np.maximum(np.minimum(rank_stop, stop) - np.maximum(rank_start, start), 0)
        return counts

    @property
    def table(self) -> torch.Tensor:
        """The EPLB table, which is not to be written to."""
        return self._table

    def counted_entries(self) -> IntArray:
        """The part of the table that means something, one number per entry: what ranks must have in common."""
        return self._experts.astype(np.int64) * self._num_slots + self._slots

    def _slot_to_expert(self) -> npt.NDArray[np.int64]:
        held = np.full(self._num_slots, -1, np.int64)
        held[self._slots] = self._experts
        if (held < 0).any():
            slot = int(np.argmax(held < 0))
            raise ConstraintError(
                "eplb_table",
                f"without slot {slot}",
                f"must name all {self._num_slots} slots for the batch rule, which splits over what every rank holds",
                "give the slot an expert, or use the occurrence rule",
            )
        return held

    def _check_slots(self) -> None:
        if self._slots.max() >= self._num_slots:
            entry = int(np.argmax(self._slots >= self._num_slots))
            raise ConstraintError(
                "eplb_table",
                f"{self._slots[entry]} in row {self._experts[entry]}",
                f"must hold slot ids below num_slots, {self._num_slots}",
                "pass the number of slots over all ranks",
            )
        by_slot = np.argsort(self._slots, kind="stable")
        repeated = np.nonzero(np.diff(self._slots[by_slot]) == 0)[0]
        if repeated.size:
            first, second = by_slot[repeated[0]], by_slot[repeated[0] + 1]
            raise ConstraintError(
                "eplb_table",
                f"{self._slots[first]} in row {self._experts[first]} and row {self._experts[second]}",
                "must name each slot once, since a slot holds one expert",
                "use the slot ids of a Placement",
            )


def check_tensors(**tensors: object) -> None:
    """Raises UnsupportedTypeError for the first that is no tensor, None included."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedTypeError(name, f"a {type(value).__name__}", "must be a torch.Tensor", "use torch.tensor")
