"""Plans for ranks of different numbers of slots, and from a placement of another world than the one to plan for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray, held_on
from evenmoe.placement import Placement
from evenmoe.planner.incremental import plan_incremental
from evenmoe.planner.options import PlanOptions, Shape, sizes_of
from evenmoe.planner.slots import histories
from evenmoe.planner.static import plan_static
from evenmoe.planner.windows import plan_windows
from evenmoe.slot_arrays import IntArray, ranks_of_slots


def plan_elastic(load: FloatArray, shape: Shape, options: PlanOptions) -> IntArray:
    """Slots int32 (L, S) for ranks of any sizes, every replica taking an even share.

    Ranks without slots are left out of the plan, and slots beyond one for each expert of a rank are filled last.

    Args:
        load: tokens float64 (L, E) or (T, L, E).
        shape, options: as `PlanOptions.checked` returns them, groups across nodes.

    Raises:
        ConstraintError: fewer copies allowed than there must be.
    """
    sizes = sizes_of(shape)
    active = [rank for rank, size in enumerate(sizes) if size]
    kept = tuple(min(sizes[rank], shape.num_experts) for rank in active)
    if options.previous is None:
        uneven = kept if min(kept) < max(kept) else None
        plan = plan_windows if load.ndim == 3 else plan_static
        slots = plan(load, len(active), sum(kept), options.seed, uneven)
    else:
        slots = _improve(load, Shape(shape.num_experts, len(active), sum(kept), 1, 1), active, kept, options)
    return _with_more(slots, kept, tuple(sizes[rank] for rank in active), load)


def _improve(
    load: FloatArray, shape: Shape, active: list[int], sizes: tuple[int, ...], options: PlanOptions
) -> IntArray:
    assert options.previous is not None
    mean = load.mean(axis=0) if load.ndim == 3 else load
    start = [np.concatenate(rows) for rows in start_from(options.previous, mean, active, sizes)]
    slots = np.array(start, np.int64)
    before = held_on(options.previous, 1 + active[-1])[:, active]
    forced = (~before[np.arange(len(slots))[:, None], ranks_of_slots(sizes), slots]).sum(axis=1)
    if options.max_copies is not None and options.max_copies < forced.max():
        layer = int(forced.argmax())
        raise ConstraintError(
            "max_copies",
            options.max_copies,
            f"must be at least {forced[layer]}, which layer {layer} needs on this world to begin with",
            "allow as many",
        )
    limits = (options.max_copies, options.target_par, options.seed)
    if load.ndim == 2:
        return plan_incremental(load, slots, shape, *limits, sizes=sizes, before=before)
    planned = np.empty(slots.shape, np.int32)
    for recorded, layers in histories(load):
        planned[layers] = plan_incremental(recorded, slots[layers], shape, *limits, sizes=sizes, before=before[layers])
    return planned


def carry_over(previous: Placement, load: FloatArray, rank_sizes: Sequence[int]) -> Placement:
    """The placement in use on ranks of other numbers of slots, by the fewest copies there can be and no more.

    >>> carry_over(Placement([[0, 1, 2, 3]], 2), np.array([[4.0, 3.0, 2.0, 1.0]]), [2, 2, 1]).slot_to_expert.tolist()
    [[0, 1, 2, 3, 0]]
    """
    mean = load.mean(axis=0) if load.ndim == 3 else load
    active = [rank for rank, size in enumerate(rank_sizes) if size]
    sizes = tuple(rank_sizes[rank] for rank in active)
    kept = tuple(min(size, previous.num_experts) for size in sizes)
    start = [np.concatenate(rows) for rows in start_from(previous, mean, active, kept)]
    slots = _with_more(np.array(start, np.int32), kept, sizes, mean)
    return Placement(slots, len(rank_sizes), num_experts=previous.num_experts, rank_sizes=rank_sizes)


def start_from(
    previous: Placement, load: FloatArray, active: Sequence[int], sizes: Sequence[int]
) -> list[list[list[int]]]:
    """The placement in use carried over to the `active` ranks, of these `sizes`, by the fewest copies there can be.

    A rank keeps what it held as far as it has room, in its slot where that is still there. So copies fill the
    slots that are more than a rank held experts; and where more experts than that have no rank to keep them, replicas
    give way. How many experts find a rank to keep them is a maximum matching, so no other way needs fewer copies.

    Args:
        load: tokens float64 (L, E), which decides between what is equally cheap.

    Returns:
        By layer and active rank, the expert of each slot.

    Rank 1 is gone, and its expert 1 takes the slot of a replica:

    >>> start_from(Placement([[0, 2, 1, 2, 0, 3]], 3), np.array([[4.0, 1.0, 6.0, 2.0]]), [0, 2], [2, 2])
    [[[1, 2], [0, 3]]]
    """
    rows = []
    ends = np.cumsum(previous.rank_sizes)
    for layer, experts in enumerate(previous.slot_to_expert):
        before = [
            list(dict.fromkeys(experts[ends[rank] - previous.rank_sizes[rank] : ends[rank]].tolist()))
            if rank < previous.num_ranks
            else []
            for rank in active
        ]
        rows.append(_carry_over(load[layer], before, sizes))
    return rows


def _carry_over(load: FloatArray, before: list[list[int]], sizes: Sequence[int]) -> list[list[int]]:
    """One layer; `before` are the experts of each rank, in the order of its slots."""
    homes = _matched(load, before, sizes)
    kept = [[expert for expert in held if homes.get(expert) == rank] for rank, held in enumerate(before)]
    counts = np.zeros(len(load), np.int64)
    for rank, held in enumerate(before):
        others = sorted((expert for expert in held if homes.get(expert) != rank), key=lambda expert: -load[expert])
        kept[rank] += others[: sizes[rank] - len(kept[rank])]
        counts[kept[rank]] += 1
    for expert in sorted((expert for expert in range(len(load)) if not counts[expert]), key=lambda e: -load[e]):
        share = [sum(load[kept[rank]] / counts[kept[rank]]) for rank in range(len(sizes))]
        free = [rank for rank in range(len(sizes)) if len(kept[rank]) < sizes[rank]]
        if free:
            rank = min(free, key=lambda rank: share[rank])
        else:  # the lightest replica gives way
            replicas = [(rank, other) for rank, held in enumerate(kept) for other in held if counts[other] > 1]
            rank, other = min(replicas, key=lambda found: load[found[1]] / counts[found[1]])
            kept[rank].remove(other)
            counts[other] -= 1
        kept[rank].append(expert)
        counts[expert] = 1
    for rank, size in enumerate(sizes):
        while len(kept[rank]) < size:
            lacking = [expert for expert in range(len(load)) if expert not in kept[rank]]
            expert = max(lacking, key=lambda expert: load[expert] / counts[expert])
            kept[rank].append(expert)
            counts[expert] += 1
    return [_in_their_slots(row, held) for row, held in zip(kept, before, strict=True)]


def _matched(load: FloatArray, before: list[list[int]], sizes: Sequence[int]) -> dict[int, int]:
    """A rank that held it for as many experts as can be, {expert: rank}, no rank with more than its slots."""
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(before):
        for expert in held:
            holders.setdefault(expert, []).append(rank)
    homes: dict[int, int] = {}
    guests: list[list[int]] = [[] for _ in before]

    def settle(expert: int, seen: set[int]) -> bool:
        """Find it a rank, if need be by moving others (Kuhn's augmenting paths)."""
        for rank in sorted(holders[expert], key=lambda rank: len(guests[rank]) - sizes[rank]):
            if rank in seen:
                continue
            seen.add(rank)
            room = len(guests[rank]) < sizes[rank]
            leaver = None if room else next((guest for guest in guests[rank] if settle(guest, seen)), None)
            if not room and leaver is None:
                continue
            if leaver is not None:
                guests[rank].remove(leaver)
            guests[rank].append(expert)
            homes[expert] = rank
            return True
        return False

    for expert in sorted(holders, key=lambda expert: (len(holders[expert]), -load[expert])):
        settle(expert, set())
    return homes


def _in_their_slots(row: list[int], held: list[int]) -> list[int]:
    """The same experts, each that was held in its slot where that is still there."""
    slots: list[int | None] = [None] * len(row)
    for slot, expert in enumerate(held[: len(row)]):
        if expert in row:
            slots[slot] = expert
    rest = iter([expert for expert in row if expert not in slots])
    return [next(rest) if expert is None else expert for expert in slots]


def _with_more(slots: IntArray, kept: tuple[int, ...], sizes: tuple[int, ...], load: FloatArray) -> IntArray:
    """Fill what a rank has beyond one slot for each expert with replicas of the least loaded, which change least."""
    if kept == sizes:
        return slots
    lightest = np.argsort(load.mean(axis=0) if load.ndim == 3 else load, axis=1, kind="stable")
    parts = []
    for rank, part in enumerate(np.split(slots, np.cumsum(kept)[:-1], axis=1)):
        more = np.take(lightest, np.arange(sizes[rank] - kept[rank]) % lightest.shape[1], axis=1)
        parts += [part, more.astype(np.int32)]
    return np.hstack(parts)
