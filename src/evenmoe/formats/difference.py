"""`diff`: what it takes to get from one placement to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import count_copies
from evenmoe.placement import Placement


@dataclass(frozen=True)
class Difference:
    """The way from one placement to another.

    Attributes:
        copies: int64 (L, ranks): experts that a rank must receive, as `count_copies` counts them.
        replicas_changed: int64 (L,): experts that have another number of replicas.
        slots_changed: int64 (L,): slots that hold another expert; -1 where the number of slots differs.
        expert_bytes: of one expert of one layer, or None.
    """

    copies: npt.NDArray[np.int64]
    replicas_changed: npt.NDArray[np.int64]
    slots_changed: npt.NDArray[np.int64]
    expert_bytes: int | None

    @property
    def bytes_to_move(self) -> npt.NDArray[np.int64] | None:
        """int64 (L, ranks), bytes that a rank receives; None without `expert_bytes`."""
        return None if self.expert_bytes is None else self.copies * self.expert_bytes


def diff(previous: Placement, placement: Placement, *, expert_bytes: int | None = None) -> Difference:
    """What must be copied, and what changes, from `previous` to `placement`.

    Args:
        previous: the placement in use.
        placement: the one to move to, of the same layers, experts and ranks.
        expert_bytes: bytes of one expert's weights in one layer, for `bytes_to_move`.

    Raises:
        ConstraintError: placements of other layers, experts or ranks; bytes that are no bytes.

    Rank 0 must receive expert 2 and rank 1 expert 1:

    >>> diff(Placement([[0, 1, 0, 2]], 2), Placement([[2, 1, 1, 0]], 2), expert_bytes=10).bytes_to_move.tolist()
    [[10, 10]]
    """
    if expert_bytes is not None and not 0 <= expert_bytes < 2**40:
        raise ConstraintError("expert_bytes", expert_bytes, "must be 0 to 2**40", "pass bytes of one expert's weights")
    total = count_copies(previous, placement)  # checks that the two fit together
    layers, ranks = placement.num_layers, placement.num_ranks
    held = np.zeros((layers, ranks, placement.num_experts), bool)
    rows = np.arange(layers)[:, None]
    held[rows, np.arange(previous.num_slots) // previous.slots_per_rank, previous.slot_to_expert] = True
    owner = np.arange(placement.num_slots) // placement.slots_per_rank
    absent = ~held[rows, owner, placement.slot_to_expert]
    copies = absent.reshape(layers, ranks, -1).sum(axis=2)
    assert np.array_equal(copies.sum(axis=1), total)
    same_width = previous.num_slots == placement.num_slots
    changed = (previous.slot_to_expert != placement.slot_to_expert).sum(axis=1) if same_width else np.full(layers, -1)
    replicas = (previous.num_replicas != placement.num_replicas).sum(axis=1)
    return Difference(copies, replicas, changed, expert_bytes)
