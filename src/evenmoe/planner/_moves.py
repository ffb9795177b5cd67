"""A walk from a placement in use to better ones, a move at a time: serial, compiled, arrays in and arrays out.

Loads are shares of the mean rank's, so 1.0 is a rank with its fair part; T windows are looked at together. One family
in one file, because numba's cache does not see an edit in another.

Letters: T windows, E experts, S slots, G ranks, K slots per rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

SWAP, REPLACE = 0, 1
# What a move of two copies, and one that copies nothing new, count for beside a move of one. With 1.8 in place of 2
# a drifted DeepSeek-V3 shape needs 28.9 copies a layer, not 29.2; the quarter lets a free move win if it helps.
TWO, FREE = 1.8, 0.25
# Less than this of the squared excess is rounding noise.
NOISE = 1e-12


class Walk(NamedTuple):
    """One layer under way."""

    weights: npt.NDArray[np.float64]  # (T, E) load of each expert
    share: npt.NDArray[np.float64]  # (T, E) load of each of its replicas
    load: npt.NDArray[np.float64]  # (T, G) load of each rank
    excess: npt.NDArray[np.float64]  # (G,) scratch: squared load over the level, all windows together
    slots: npt.NDArray[np.int64]  # (S,) expert of each slot
    counts: npt.NDArray[np.int64]  # (E,) replicas
    hosts: npt.NDArray[np.int64]  # (E, G) ranks of each expert, the first `counts` of a row
    held: npt.NDArray[np.int64]  # (G, E) replicas on each rank: 0 or 1, unless the placement in use has twins
    before: npt.NDArray[np.bool_]  # (G, E) what the placement in use holds
    fewer: npt.NDArray[np.float64]  # (E,) scratch: gain from one replica fewer, its own rank aside
    more: npt.NDArray[np.float64]  # (E,) scratch: gain from one replica more, its new rank aside
    slot_share: npt.NDArray[np.float64]  # (T, S) scratch: `share` by slot
    slot_load: npt.NDArray[np.float64]  # (T, S) scratch: load over the level of each slot's rank
    base: npt.NDArray[np.float64]  # (S,) scratch: excess of the busiest rank, -1 where there is nothing to swap
    gain: npt.NDArray[np.float64]  # (S,) scratch: drop of squared excess by slot to swap with
    cost: npt.NDArray[np.int64]  # (S,) scratch: copies that the busiest rank's side of a swap adds
    change: npt.NDArray[np.float64]  # (G,) scratch: what a move adds to each rank
    move: npt.NDArray[np.int64]  # (3,) the move found: kind, slot, other slot or expert


@njit(cache=True, nogil=True)
def walk_layers(weights, num_ranks, target, level, budget, slots, peaks):
    """Improve every row of `slots` (L, S) in place by few copies; fill `peaks` (L,), mean peak over the windows.

    A walk ends when its peak is at most `target` (L,), when it would need more than `budget` copies, or when no move
    lowers the excess over `level`. It takes the same moves under every budget, and its best place is kept, so that a
    larger budget never gives a worse placement. `weights` is (L, T, E).
    """
    walk = _new_walk(weights.shape[1], weights.shape[2], num_ranks, slots.shape[1])
    for layer in range(len(slots)):
        _begin(walk, weights[layer], slots[layer])
        best = _peak(walk)
        used = 0
        while best > target[layer]:
            if not _find_move(walk, level):
                break
            used += _copies(walk, walk.move)
            if used > budget:
                break
            _apply(walk)
            peak = _peak(walk)
            if peak < best:
                best = peak
                slots[layer] = walk.slots
        peaks[layer] = best


@njit(cache=True, nogil=True)
def _new_walk(num_windows, num_experts, num_ranks, num_slots):
    return Walk(
        np.zeros((num_windows, num_experts)),
        np.zeros((num_windows, num_experts)),
        np.zeros((num_windows, num_ranks)),
        np.zeros(num_ranks),
        np.zeros(num_slots, np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_ranks, num_experts), np.int64),
        np.zeros((num_ranks, num_experts), np.bool_),
        np.zeros(num_experts),
        np.zeros(num_experts),
        np.zeros((num_windows, num_slots)),
        np.zeros((num_windows, num_slots)),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots, np.int64),
        np.zeros(num_ranks),
        np.zeros(3, np.int64),
    )


@njit(cache=True, nogil=True)
def _begin(walk, weights, slots):
    width = len(slots) // walk.load.shape[1]
    walk.weights[:] = weights
    walk.slots[:] = slots
    walk.counts[:] = 0
    walk.held[:] = 0
    walk.before[:] = False
    for slot in range(len(slots)):
        expert, rank = slots[slot], slot // width
        walk.hosts[expert, walk.counts[expert]] = rank
        walk.counts[expert] += 1
        walk.held[rank, expert] += 1
        walk.before[rank, expert] = True
    walk.load[:] = 0.0
    for window in range(len(weights)):
        walk.share[window] = weights[window] / walk.counts
        for slot in range(len(slots)):
            walk.load[window, slot // width] += walk.share[window, slots[slot]]


@njit(cache=True, nogil=True)
def _peak(walk):
    total = 0.0
    for window in range(len(walk.load)):
        total += walk.load[window].max()
    return total / len(walk.load)


@njit(cache=True, nogil=True)
def _excess(load, level):
    over = load - level
    return over * over if over > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _price(copies):
    return TWO if copies == 2 else max(copies, FREE)


@njit(cache=True, nogil=True)
def _find_move(walk, level):
    """Write the move with the largest drop of squared excess per copy to `walk.move`; False if none drops it."""
    for rank in range(walk.load.shape[1]):
        walk.excess[rank] = 0.0
        for window in range(len(walk.load)):
            walk.excess[rank] += _excess(walk.load[window, rank], level)
    if walk.excess.max() < NOISE:
        return False
    best = _find_swap(walk, level)
    return _find_replacement(walk, level, best) > 0.0


@njit(cache=True, nogil=True)
def _find_swap(walk, level):
    """Exchange an expert of the busiest rank with any other rank's; return the drop per copy, 0.0 for none."""
    num_windows, num_ranks = walk.load.shape
    width = len(walk.slots) // num_ranks
    hot = walk.excess.argmax()
    gain = walk.gain
    for other in range(len(gain)):
        rank, theirs = other // width, walk.slots[other]
        walk.cost[other] = _new(walk, hot, theirs) - _new(walk, rank, theirs)
        # What the busiest rank has already is no exchange: never worth it.
        walk.base[other] = walk.excess[hot] if rank != hot and not walk.held[hot, theirs] else -1.0
        for window in range(num_windows):
            walk.slot_share[window, other] = walk.share[window, theirs]
            walk.slot_load[window, other] = walk.load[window, rank] - level
    best, least = 0.0, NOISE
    for slot in range(hot * width, (hot + 1) * width):
        mine = walk.slots[slot]
        gain[:] = walk.base
        for window in range(num_windows):
            here, share = walk.load[window, hot] - level, walk.share[window, mine]
            # No branch, so that the compiler takes several slots at a time.
            for other in range(len(gain)):
                there = walk.slot_load[window, other]
                shift = share - walk.slot_share[window, other]
                after, kept = there + shift, here - shift
                there = there if there > 0.0 else 0.0
                after = after if after > 0.0 else 0.0
                kept = kept if kept > 0.0 else 0.0
                gain[other] += there * there - after * after - kept * kept
        back = _new(walk, hot, mine)
        for rank in range(num_ranks):
            if walk.held[rank, mine]:
                continue
            cost = _new(walk, rank, mine) - back
            for other in range(rank * width, (rank + 1) * width):
                if gain[other] > least and gain[other] > best * _price(cost + walk.cost[other]):
                    best = gain[other] / _price(cost + walk.cost[other])
                    least = max(best * FREE, NOISE)
                    walk.move[0], walk.move[1], walk.move[2] = SWAP, slot, other
    return best


@njit(cache=True, nogil=True)
def _find_replacement(walk, level, best):
    """Turn a replica of one expert into one of another; return the drop per copy, at least `best`."""
    num_ranks, num_experts = walk.held.shape
    width = len(walk.slots) // num_ranks
    _weigh_counts(walk, level)
    most = walk.more.max()
    for slot in range(len(walk.slots)):
        gone, rank = walk.slots[slot], slot // width
        # `fewer` is exact but at this rank, which can lose its whole excess.
        fixed = walk.fewer[gone] + walk.excess[rank]
        if walk.counts[gone] < 2 or fixed + most <= max(best * FREE, NOISE):
            continue
        undone = _new(walk, rank, gone)
        for expert in range(num_experts):
            if fixed + walk.more[expert] <= max(best * FREE, NOISE) or walk.held[rank, expert]:
                continue
            cost = _price(_new(walk, rank, expert) - undone)
            if fixed + walk.more[expert] <= best * cost or walk.counts[expert] == num_ranks:
                continue
            gain = _replacement_gain(walk, slot, expert, level)
            if gain > NOISE and gain / cost > best:
                best = gain / cost
                walk.move[0], walk.move[1], walk.move[2] = REPLACE, slot, expert
    return best


@njit(cache=True, nogil=True)
def _weigh_counts(walk, level):
    """Fill `fewer` (losses, 0 or less, an upper bound) and `more` (gains) for one replica less or more."""
    for expert in range(len(walk.counts)):
        count = walk.counts[expert]
        fewer = more = 0.0
        for window in range(len(walk.load)):
            share = walk.share[window, expert]
            up = share / (count - 1) if count > 1 else 0.0
            down = share / (count + 1)
            for i in range(count):
                load = walk.load[window, walk.hosts[expert, i]]
                now = _excess(load, level)
                if count > 1:
                    fewer += now - _excess(load + up, level)
                more += now - _excess(load - down, level)
        walk.fewer[expert], walk.more[expert] = fewer, more


@njit(cache=True, nogil=True)
def _changes(walk, window, slot, expert):
    """Fill `walk.change` with what replacing the replica in `slot` by `expert` adds to the ranks."""
    num_ranks = walk.load.shape[1]
    gone, rank = walk.slots[slot], slot // (len(walk.slots) // num_ranks)
    walk.change[:] = 0.0
    count = walk.counts[gone]
    up = walk.share[window, gone] / (count - 1)
    for i in range(count):
        walk.change[walk.hosts[gone, i]] += up
    walk.change[rank] -= walk.weights[window, gone] / (count - 1)
    count = walk.counts[expert]
    down = walk.share[window, expert] / (count + 1)
    for i in range(count):
        walk.change[walk.hosts[expert, i]] -= down
    walk.change[rank] += walk.weights[window, expert] / (count + 1)


@njit(cache=True, nogil=True)
def _replacement_gain(walk, slot, expert, level):
    gain = 0.0
    for window in range(len(walk.load)):
        _changes(walk, window, slot, expert)
        for rank in range(walk.load.shape[1]):
            if walk.change[rank] != 0.0:
                load = walk.load[window, rank]
                gain += _excess(load, level) - _excess(load + walk.change[rank], level)
    return gain


@njit(cache=True, nogil=True)
def _copies(walk, move):
    """Copies that `move` adds; negative when it takes copies back."""
    width = len(walk.slots) // walk.load.shape[1]
    rank, mine = move[1] // width, walk.slots[move[1]]
    if move[0] == REPLACE:
        return _new(walk, rank, move[2]) - _new(walk, rank, mine)
    other, theirs = move[2] // width, walk.slots[move[2]]
    added = _new(walk, rank, theirs) + _new(walk, other, mine)
    return added - _new(walk, rank, mine) - _new(walk, other, theirs)


@njit(cache=True, nogil=True)
def _new(walk, rank, expert):
    return 0 if walk.before[rank, expert] else 1


@njit(cache=True, nogil=True)
def _apply(walk):
    kind, slot, other = walk.move[0], walk.move[1], walk.move[2]
    num_ranks = walk.load.shape[1]
    width = len(walk.slots) // num_ranks
    rank, mine = slot // width, walk.slots[slot]
    if kind == REPLACE:
        for window in range(len(walk.load)):
            _changes(walk, window, slot, other)
            for r in range(num_ranks):
                walk.load[window, r] += walk.change[r]
        _leave(walk, mine, rank)
        walk.counts[mine] -= 1
        walk.hosts[other, walk.counts[other]] = rank
        walk.counts[other] += 1
        walk.held[rank, mine] -= 1
        walk.held[rank, other] += 1
        walk.slots[slot] = other
        for window in range(len(walk.load)):
            walk.share[window, mine] = walk.weights[window, mine] / walk.counts[mine]
            walk.share[window, other] = walk.weights[window, other] / walk.counts[other]
        return
    there, theirs = other // width, walk.slots[other]
    for window in range(len(walk.load)):
        shift = walk.share[window, mine] - walk.share[window, theirs]
        walk.load[window, rank] -= shift
        walk.load[window, there] += shift
    _leave(walk, mine, rank)
    walk.hosts[mine, walk.counts[mine] - 1] = there
    _leave(walk, theirs, there)
    walk.hosts[theirs, walk.counts[theirs] - 1] = rank
    for expert, off, on in ((mine, rank, there), (theirs, there, rank)):
        walk.held[off, expert] -= 1
        walk.held[on, expert] += 1
    walk.slots[slot], walk.slots[other] = theirs, mine


@njit(cache=True, nogil=True)
def _leave(walk, expert, rank):
    """Take `rank` out of the expert's hosts; the last one takes its place in the list."""
    last = walk.counts[expert] - 1
    for i in range(last):
        if walk.hosts[expert, i] == rank:
            walk.hosts[expert, i] = walk.hosts[expert, last]
            return


@njit(cache=True, nogil=True)
def keep_places(slots, num_ranks, ordered):
    """Reorder each rank's experts of `slots` (L, S) so that those that stay keep their slot.

    `ordered` (L, S) holds the placement in use, and afterwards the new one.
    """
    num_slots = slots.shape[1]
    width = num_slots // num_ranks
    arriving = np.empty(width, np.int64)
    free = np.empty(width, np.int64)
    for layer in range(len(slots)):
        for first in range(0, num_slots, width):
            arriving[:] = slots[layer, first : first + width]
            num_free = 0
            for slot in range(first, first + width):
                stays = False
                for i in range(width):
                    if not stays and arriving[i] == ordered[layer, slot]:
                        arriving[i] = -1
                        stays = True
                if not stays:
                    free[num_free] = slot
                    num_free += 1
            taken = 0
            for i in range(width):
                if arriving[i] >= 0:
                    ordered[layer, free[taken]] = arriving[i]
                    taken += 1
