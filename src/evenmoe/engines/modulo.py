"""vllm-ascend's replica rule: rank r takes replica r mod count of every expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.rules.rank import LookupChooser
from evenmoe.rules.rule import Chooser, Rule
from evenmoe.rules.table import replicas_at

if TYPE_CHECKING:
    import torch


class ModuloRule(Rule):
    """All tokens of a rank take one replica, as by the rank rule, but every replica has a rank while ranks last."""

    name = "modulo"
    description = "Every token of rank r takes replica r mod replicas; vllm-ascend's without tensor parallelism."
    kernel = 5

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """See `Rule.prepare`."""
        return LookupChooser(replicas_at(eplb_table, rank % eplb_table[:, :1]).flatten(), len(eplb_table))

    def shares(self, placement: Placement) -> FloatArray:
        """Float64 (L, S): of W ranks, those that choose the slot.

        Three replicas on eight ranks: 0, 3, 6 take the first, 1, 4, 7 the second, 2 and 5 the third.

        >>> RULE.shares(Placement([[0, 0, 0, 1, 2, 3, 4, 5]], num_ranks=8))[0, :4].tolist()
        [0.375, 0.375, 0.25, 1.0]
        """
        replicas = np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)
        world = placement.num_ranks
        return ((world - placement.replica_index + replicas - 1) // replicas) / world

    def reachable(self, num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
        """As many replicas as there are ranks."""
        return np.minimum(np.asarray(num_replicas, np.int64), world_size)


RULE = ModuloRule()
