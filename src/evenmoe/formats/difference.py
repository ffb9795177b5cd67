"""`diff`: what it takes to get from one placement to another, and which of their layers belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import Contents
from evenmoe.formats.layer_numbers import DENSE_ROWS, ranges
from evenmoe.metrics import count_copies
from evenmoe.placement import Placement, layers_of


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


def common_layers(
    previous: Contents, placement: Contents
) -> tuple[Placement, Placement, tuple[int, ...] | None, list[str]]:
    """The layers of two placements that belong together: found by number where both are numbered, else in order.

    Returns:
        Both placements, row by row the same layers; the layers' numbers, None where they are merely counted; and a
        sentence for rows that were left out because only one of the two has a row for dense layers.

    Raises ConstraintError where a MoE layer of one is missing from the other.
    """
    assert previous.placement is not None
    assert placement.placement is not None
    ours, theirs = placement.layer_ids, previous.layer_ids
    if ours is None or theirs is None or ours == theirs:
        return previous.placement, placement.placement, ours or theirs, []
    notes = []
    for name, contents, others in (("the previous placement", previous, ours), ("the placement", placement, theirs)):
        assert contents.layer_ids is not None
        absent = sorted(set(contents.layer_ids) - set(others))
        if not absent:
            continue
        if len(absent) == len(contents.layer_ids) or not contents.metadata.get(DENSE_ROWS):
            raise ConstraintError(
                "layers",
                f"{ranges(absent)} in {name} alone",
                "must be the same in both",
                "choose those that both have with layers (--layers), or name placements of one model",
            )
        notes.append(f"left out the rows {ranges(absent)} of {name}, taken for dense layers: the other has none")
    common = tuple(number for number in ours if number in set(theirs))
    before = layers_of(previous.placement, [theirs.index(number) for number in common])
    return before, layers_of(placement.placement, [ours.index(number) for number in common]), common, notes
