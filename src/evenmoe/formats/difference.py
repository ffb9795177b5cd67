"""`diff`: what it takes to get from one placement to another, and which of their layers belong together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import Contents
from evenmoe.formats.layer_numbers import DENSE_ROWS, ranges
from evenmoe.metrics import arrivals, copies_by_rank, held_on
from evenmoe.placement import Placement, layers_of


@dataclass(frozen=True)
class Difference:
    """The way from one placement to another.

    Attributes:
        copies: int64 (L, ranks): experts that a rank of the placement to move to must receive, as `count_copies` counts
            them.
        replicas_changed: int64 (L,): experts that have another number of replicas.
        slots_changed: int64 (L,): slots that hold another expert; -1 where the ranks have other numbers of slots.
        expert_bytes: of one expert of one layer, or None.
        moves: int64 (copies, 4), rows of layer, expert, the rank to copy from and the rank to copy to, layer by layer
            and slot by slot. The source held the expert before; -1 where no rank that remains did, so that its weights
            must be loaded anew.
    """

    copies: npt.NDArray[np.int64]
    replicas_changed: npt.NDArray[np.int64]
    slots_changed: npt.NDArray[np.int64]
    expert_bytes: int | None
    moves: npt.NDArray[np.int64]

    @property
    def bytes_to_move(self) -> npt.NDArray[np.int64] | None:
        """int64 (L, ranks), bytes that a rank receives; None without `expert_bytes`."""
        return None if self.expert_bytes is None else self.copies * self.expert_bytes


def diff(
    previous: Placement,
    placement: Placement,
    *,
    expert_bytes: int | None = None,
    ranks_per_node: int = 8,
    dead_ranks: Collection[int] = (),
) -> Difference:
    """What must be copied, and what changes, from `previous` to `placement`.

    Args:
        previous: the placement in use.
        placement: the one to move to, of the same layers and experts. Its ranks and slots may be more or fewer: rank r
            is the same rank in both.
        expert_bytes: bytes of one expert's weights in one layer, for `bytes_to_move`.
        ranks_per_node: ranks in a row that are near each other, for the sources of `moves`.
        dead_ranks: ranks whose weights are lost, so that nothing is copied from them. A rank that `placement` no longer
            has, or that has no slot there, is taken to be still there to copy from unless it is one of these.

    Raises:
        ConstraintError: placements of other layers or experts; bytes that are no bytes; no such ranks.

    Rank 0 must receive expert 2 and rank 1 expert 1:

    >>> diff(Placement([[0, 1, 0, 2]], 2), Placement([[2, 1, 1, 0]], 2), expert_bytes=10).bytes_to_move.tolist()
    [[10, 10]]

    A third rank joins; ranks 0 and 1 send one expert each:

    >>> diff(Placement([[0, 1, 2, 3]], 2), Placement([[0, 1, 2, 3, 0, 2]], 3)).moves.tolist()
    [[0, 0, 0, 2], [0, 2, 1, 2]]
    """
    if expert_bytes is not None and not 0 <= expert_bytes < 2**40:
        raise ConstraintError("expert_bytes", expert_bytes, "must be 0 to 2**40", "pass bytes of one expert's weights")
    whole_number("ranks_per_node", ranks_per_node, 1)
    for rank in dead_ranks:
        if not 0 <= rank < previous.num_ranks:
            rule = f"must be ranks of the previous placement, 0 to {previous.num_ranks - 1}"
            raise ConstraintError("dead_ranks", rank, rule, "leave it out")
    copies = copies_by_rank(previous, placement)  # checks that the two fit together
    same = previous.rank_sizes == placement.rank_sizes
    changed = (previous.slot_to_expert != placement.slot_to_expert).sum(axis=1)  if same else np.full(len(copies), -1)
    replicas = (previous.num_replicas != placement.num_replicas).sum(axis=1)
    moves = _moves(previous, placement, ranks_per_node, dead_ranks)
    return Difference(copies, replicas, changed, expert_bytes, moves)


def _moves(
    previous: Placement, placement: Placement, ranks_per_node: int, dead_ranks: Collection[int]
) -> npt.NDArray[np.int64]:
    """As `Difference.moves`: from the same node if any rank of it held the expert; of those the one that has sent the
    fewest so far, then the lowest."""
    num_ranks = max(previous.num_ranks, placement.num_ranks)
    held = held_on(previous, num_ranks).copy()
    arriving = np.argwhere(arrivals(held, placement))
    held[:, list(dead_ranks)] = False
    nodes = np.arange(num_ranks) // ranks_per_node
    sent = np.zeros(num_ranks, np.int64)
    moves = np.empty((len(arriving), 4), np.int64)
    for row, (layer, slot) in enumerate(arriving.tolist()):
        expert, target = int(placement.slot_to_expert[layer, slot]), int(placement.slot_to_rank[slot])
        holders = np.flatnonzero(held[layer, :, expert])
        near = holders[nodes[holders] == nodes[target]]
        sources = near if near.size else holders
        source = int(sources[np.argmin(sent[sources])]) if sources.size else -1
        if source >= 0:
            sent[source] += 1
        moves[row] = layer, expert, source, target
    return moves


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
