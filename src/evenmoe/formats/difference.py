"""`diff`: what it takes to get from one placement to another, and which of their layers belong together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import Format
from evenmoe.formats.contents import Contents, RawPlacement, ReadOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import DENSE_ROWS, is_trivial, ranges
from evenmoe.formats.reading import contents_of, open_placement
from evenmoe.metrics import arrivals, check_same_model, held_on
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
            and slot by slot. The source held the expert before; -1 where no live rank did, so that its weights must be
            loaded anew.
        num_ranks: of the larger world.
    """

    copies: npt.NDArray[np.int64]
    replicas_changed: npt.NDArray[np.int64]
    slots_changed: npt.NDArray[np.int64]
    expert_bytes: int | None
    moves: npt.NDArray[np.int64]
    num_ranks: int

    @property
    def bytes_to_move(self) -> npt.NDArray[np.int64] | None:
        """int64 (L, ranks), bytes that a rank receives; None without `expert_bytes`."""
        return None if self.expert_bytes is None else self.copies * self.expert_bytes

    @property
    def sent(self) -> npt.NDArray[np.int64]:
        """int64 (ranks,): experts that each rank of the larger world sends."""
        sources = self.moves[:, 2]
        return np.bincount(sources[sources >= 0], minlength=self.num_ranks)


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
        dead_ranks: ranks of `previous` whose weights are lost: nothing is copied from them, and one that comes back
            empty receives all it holds. Others that `placement` no longer has are still there to copy from.

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
    if ranks_per_node < 1:
        raise ConstraintError("ranks_per_node", ranks_per_node, "must be at least 1", "pass the ranks of a node")
    for rank in dead_ranks:
        if not 0 <= rank < previous.num_ranks:
            rule = f"must be a rank of the previous placement, 0 to {previous.num_ranks - 1}"
            raise ConstraintError("dead_ranks", rank, rule, "leave it out")
    moves = _moves(previous, placement, ranks_per_node, dead_ranks)  # checks that the two fit together
    copies = np.zeros((placement.num_layers, placement.num_ranks), np.int64)
    np.add.at(copies, (moves[:, 0], moves[:, 3]), 1)
    same = previous.rank_sizes == placement.rank_sizes
    changed = (previous.slot_to_expert != placement.slot_to_expert).sum(axis=1) if same else np.full(len(copies), -1)
    replicas = (previous.num_replicas != placement.num_replicas).sum(axis=1)
    return Difference(copies, replicas, changed, expert_bytes, moves, max(previous.num_ranks, placement.num_ranks))


def _moves(
    previous: Placement, placement: Placement, ranks_per_node: int, dead_ranks: Collection[int]
) -> npt.NDArray[np.int64]:
    """As `Difference.moves`: from the same node if any rank of it held the expert; of those the one that has sent the
    fewest so far, then the lowest."""
    check_same_model(previous, placement)
    num_ranks = max(previous.num_ranks, placement.num_ranks)
    held = held_on(previous, num_ranks).copy()
    held[:, list(dead_ranks)] = False
    arriving = np.argwhere(arrivals(held, placement))
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


def read_pair(
    before: str | Path, after: str | Path, options: ReadOptions, ranks_after: int | None = None
) -> tuple[Contents, Contents]:
    """Both placements; what one file does not say is taken from the other: ranks, and all sizes of `trivial`.

    Args:
        before, after: as `read` takes them.
        options: hold for both files. Their `num_ranks` are for those that do not say; where both do, for both.
        ranks_after: ranks of `after` where they are others.

    Raises:
        FileFormatError, ConstraintError, OSError: as `read_placement`.
    """
    sources = (before, after)
    opened: dict[int, tuple[Document, Format, RawPlacement]] = {}
    for which in sorted((0, 1), key=lambda which: str(sources[which]) == "trivial"):
        known = options
        if opened and str(sources[which]) == "trivial":
            _, _, other = opened[1 - which]
            experts = other.num_experts or 1 + max(int(slots.max(initial=-1)) for slots in other.slots)
            known = replace(
                options,
                num_layers=options.num_layers or len(other.slots) - other.mtp_layers,
                num_experts=options.num_experts or experts,
                num_slots=options.num_slots or len(other.slots[0]),
                layers=None,  # which chose those of the other already
                first_layer=None,
            )
        opened[which] = open_placement(sources[which], known)
    sizes = [opened[which][2].rank_sizes for which in (0, 1)]
    stated = [None if each is None else len(each[0]) for each in sizes]
    given = [options.num_ranks, ranks_after or options.num_ranks]
    if None in stated and ranks_after is None:
        given = [given[which] if stated[which] is None else None for which in (0, 1)]
    contents = []
    for which in (0, 1):
        ranks = given[which] or (stated[1 - which] if stated[which] is None else None)
        contents.append(contents_of(*opened[which], replace(options, num_ranks=ranks, num_slots=None)))
    return contents[0], contents[1]


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
    if (previous.layer_ids is None) != (placement.layer_ids is None):
        return _counted_beside_numbered(previous, placement)
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


def _counted_beside_numbered(
    previous: Contents, placement: Contents
) -> tuple[Placement, Placement, tuple[int, ...] | None, list[str]]:
    """As `common_layers`, where one of the two counts MoE layers and the other numbers the model's.

    Where the numbered one has rows for dense layers, too, these are the rows with the trivial map, if they are as many
    as it has more.
    """
    counted, numbered = (previous, placement) if previous.layer_ids is None else (placement, previous)
    assert counted.placement is not None
    assert numbered.placement is not None
    assert numbered.layer_ids is not None
    rows, more = numbered.placement, numbered.placement.num_layers - counted.placement.num_layers
    kept = np.arange(rows.num_layers)
    notes: list[str] = []
    if more > 0 and numbered.metadata.get(DENSE_ROWS):
        trivial = np.array([is_trivial(row) for row in rows.slot_to_expert])
        if trivial.sum() != more:
            raise ConstraintError(
                "layers",
                f"{counted.placement.num_layers} in one placement and {rows.num_layers} in the other, which has a row "
                "for every hidden layer",
                "must be the same in both",
                "say which is the model's first MoE layer with first_layer (--first-layer)",
            )
        kept = np.flatnonzero(~trivial)
        dropped = ranges([numbered.layer_ids[row] for row in np.flatnonzero(trivial)])
        notes.append(
            f"left out the layers {dropped}, taken for dense ones: the other placement counts MoE layers alone"
        )
    numbers = tuple(numbered.layer_ids[row] for row in kept)
    if counted is previous:
        return counted.placement, layers_of(rows, kept), numbers, notes
    return layers_of(rows, kept), counted.placement, numbers, notes
