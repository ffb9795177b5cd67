"""The `rank` rule (Ascend's balance mode 0): one replica for all tokens of a rank.

Rank r takes replica r // ceil(W / count), so replica j gets the ranks from j · ceil(W / count) on (specification §1.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.rules.rule import Chooser, Counts, Mask, Rule
from evenmoe.rules.table import check_ids, replicas_at

if TYPE_CHECKING:
    import torch


def ranks_per_replica(num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """Ranks that choose each replica but the last reachable one: ceil(W / count), integers of the shape given.

    >>> ranks_per_replica([1, 3, 5, 8], world_size=8).tolist()
    [8, 3, 2, 1]
    """
    return -(-world_size // np.asarray(num_replicas, np.int64))


def reachable(num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """Replicas that some rank chooses: ceil(W / ceil(W / count)), integers of the shape given.

    Eight ranks leave the last of 5, 6 and 7 replicas without a token:

    >>> reachable([1, 2, 3, 4, 5, 6, 7, 8], world_size=8).tolist()
    [1, 2, 3, 4, 4, 4, 4, 8]
    """
    return ranks_per_replica(ranks_per_replica(num_replicas, world_size), world_size)


def ranks_choosing(num_replicas: npt.ArrayLike, replica_index: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """How many of the W ranks choose replica `replica_index` (from 0) of `num_replicas`; the arguments broadcast.

    >>> ranks_choosing(3, [0, 1, 2], world_size=8).tolist()
    [3, 3, 2]
    >>> ranks_choosing(5, [0, 1, 2, 3, 4], world_size=8).tolist()
    [2, 2, 2, 2, 0]
    """
    width = ranks_per_replica(num_replicas, world_size)
    return np.clip(world_size - width * np.asarray(replica_index, np.int64), 0, width)


class RankRule(Rule):
    """All tokens of a rank take one replica, which spares the exchange of anything; some replicas may stay idle."""

    name = "rank"
    description = "Every token of rank r takes replica r // ceil(ranks / replicas); Ascend's balance mode 0."
    plan_for = "rank"
    balance_mode = 0
    kernel = 0

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """See `Rule.prepare`."""
        replica = rank // -(-world_size // eplb_table[:, :1])
        return LookupChooser(replicas_at(eplb_table, replica).flatten(), len(eplb_table))

    def shares(self, placement: Placement) -> FloatArray:
        """Float64 (L, S): of W ranks, those that choose the slot.

        Three replicas on eight ranks: the first two serve three ranks each, the last one two.

        >>> placement = Placement([[0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]], num_ranks=8)
        >>> RULE.shares(placement)[0, [0, 2, 4, 1]].tolist()
        [0.375, 0.375, 0.25, 1.0]
        """
        replicas = np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)
        return ranks_choosing(replicas, placement.replica_index, placement.num_ranks) / placement.num_ranks

    def reachable(self, num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
        """See the function `reachable`."""
        return reachable(num_replicas, world_size)


class LookupChooser(Chooser):
    """A slot for every expert, int32 (E,)."""

    finds_wrong_ids = True

    def __init__(self, slots: torch.Tensor, num_experts: int) -> None:
        self._slots, self._num_experts = slots, num_experts
        self._by_dtype: dict[torch.dtype, torch.Tensor] = {}  # of the ids, which the output shares

    def __call__(self, expert_ids: torch.Tensor, counted: Mask = None, counts_by_rank: Counts = None) -> torch.Tensor:
        """See `Chooser`; raises ConstraintError for an id without a row on the CPU."""
        return self._look_up(expert_ids, expert_ids)

    def _look_up(self, expert_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        slots = self._by_dtype.get(expert_ids.dtype)
        if slots is None:
            slots = self._by_dtype[expert_ids.dtype] = self._slots.to(expert_ids.dtype)
        try:
            # On the flat ids index_select takes three quarters of the time of torch.take.
            return slots.index_select(0, index.reshape(-1)).view(expert_ids.shape)
        except IndexError:
            check_ids(expert_ids, self._num_experts)
            raise


RULE = RankRule()
