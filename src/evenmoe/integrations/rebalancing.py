"""The next placement for a server that counts its experts' tokens and asks for another map from time to time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from evenmoe.planner.plan import plan

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rebalancing:
    """What takes the place of a server's own balancer: plans from the placement in use, which copy few experts.

    Attributes:
        max_copies: at most so many experts are copied in a layer at a time; None for as many as the plan is worth.

    Expert 0 has grown, and one copy gives it a second slot:

    >>> Rebalancing().next_map(np.array([[90, 30, 30, 30]]), 6, 2, in_use=np.array([[0, 1, 2, 3, 1, 2]])).tolist()
    [[0, 1, 2, 3, 1, 0]]
    """

    max_copies: int | None = None

    def next_map(
        self,
        tokens: npt.ArrayLike,
        num_slots: int,
        num_ranks: int,
        *,
        num_nodes: int = 1,
        num_groups: int = 1,
        in_use: npt.ArrayLike | None = None,
    ) -> IntArray:
        """The expert of every slot.

        Args:
            tokens: (L, E) of each logical expert, or windows of them, (T, L, E).
            num_slots: S, a multiple of the ranks. num_ranks: G.
            num_nodes, num_groups: as in `evenmoe.plan`; groups that do not divide by the nodes are not kept together.
            in_use: (L, S), the map in use. Where it is None, of other sizes, lacks an expert, has a negative entry or
                groups that are torn between nodes, the plan is made anew.

        Returns:
            int64 (L, S). Without any token, the map in use, or one that has all experts in turn.

        Raises:
            ConstraintError: tokens or sizes that cannot be planned for.
        """
        counted = np.asarray(tokens)
        shape = (counted.shape[-2], num_slots) if counted.ndim > 1 else ()
        before = _usable(in_use, shape, counted.shape[-1], num_ranks)
        if num_groups % num_nodes:
            num_nodes = num_groups = 1
        if not counted.any():  # a server's trial run before it serves
            if before is not None:
                return before.slot_to_expert.astype(np.int64)
            counted = np.ones(counted.shape, np.int64)
        anew = partial(
            plan, counted, num_ranks=num_ranks, num_slots=num_slots, num_nodes=num_nodes, num_groups=num_groups
        )
        if before is None:
            return anew().slot_to_expert.astype(np.int64)
        try:
            found = anew(previous=before, max_copies=self.max_copies)
        except ConstraintError:  # such as torn groups; what cannot be planned at all is an error below, too
            found = anew()
        return found.slot_to_expert.astype(np.int64)


def _usable(in_use: npt.ArrayLike | None, shape: tuple[int, ...], num_experts: int, num_ranks: int) -> Placement | None:
    """The placement in use, if a plan can start from it."""
    if in_use is None:
        return None
    slots = np.asarray(in_use)
    if slots.shape != shape or slots.size == 0 or slots.min() < 0 or slots.max() >= num_experts:
        return None
    if any(len(np.unique(layer)) < num_experts for layer in slots):
        return None
    return Placement(slots, num_ranks=num_ranks, num_experts=num_experts)
