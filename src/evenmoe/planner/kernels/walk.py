"""A walk from a placement in use to better ones, a move at a time: serial, compiled, arrays in and arrays out.

Loads are shares of the mean rank's, so 1.0 is a rank with its fair part; T windows are looked at together.

Letters: T windows, E experts, S slots, G ranks, K slots per rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled

SWAP, REPLACE = 0, 1
NEVER = 9  # more copies than any move adds
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
    excess: npt.NDArray[np.float64]  # (G,) scratch: squared load over the threshold, all windows together
    slots: npt.NDArray[np.int64]  # (S,) expert of each slot
    counts: npt.NDArray[np.int64]  # (E,) replicas
    ranks_of: npt.NDArray[np.int64]  # (E, G) ranks of each expert, the first `counts` of a row
    held: npt.NDArray[
        np.int8
    ]  # (G, E) replicas on each rank: 0 or 1, unless the placement in use repeats an expert on a rank
    before: npt.NDArray[np.bool_]  # (G, E) what the placement in use holds
    slot_share: npt.NDArray[np.float64]  # (T, S) `share` by slot
    lightest: npt.NDArray[np.float64]  # (T, G) least `slot_share` of each rank
    arrived: npt.NDArray[np.bool_]  # (S,) whether the slot's rank did not hold its expert before
    gain: npt.NDArray[np.float64]  # (K,) scratch: drop of squared excess by slot
    cost: npt.NDArray[np.int64]  # (K,) scratch: copies that the busiest rank's side of a swap adds
    dirty: npt.NDArray[np.int64]  # (G,) replicas on each rank that the placement in use did not hold there
    change: npt.NDArray[np.float64]  # (G,) scratch: what a move adds to each rank
    move: npt.NDArray[np.int64]  # (3,) the move found: kind, slot, other slot or expert


@compiled
def walk_layers(weights, num_ranks, node_ranks, target, threshold, budget, before, movable, slots, peaks):
    """Improve every row of `slots` (L, S) in place by few copies; fill `peaks` (L,), mean peak over the windows.

    A walk ends when its peak is at most `target` (L,), when it would need more than `budget` copies, or when no move
    lowers the excess over `threshold` (L, T). It takes the same moves under every budget, and its best place is kept,
    so that a larger budget never gives a worse placement. `weights` is (L, T, E); `before` bool (L, G, E) is what ranks
    held already, which costs no copy, or has no layers where that is what `slots` begin with. Experts stay in their
    node, `node_ranks` ranks in a row, and those from `movable` on in their slots.
    """
    walk = _new_walk(weights.shape[1], weights.shape[2], num_ranks, slots.shape[1])
    for layer in range(len(slots)):
        _begin(walk, weights[layer], slots[layer], movable)
        if len(before) > 0:
            walk.before[:] = before[layer]
            for slot in range(len(walk.slots)):
                _mark(walk, slot)
        best = _peak(walk)
        used = walk.dirty.sum()
        while best > target[layer]:
            if not _find_move(walk, threshold[layer], node_ranks):
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


@compiled
def _new_walk(num_windows, num_experts, num_ranks, num_slots):
    return Walk(
        np.zeros((num_windows, num_experts)),
        np.zeros((num_windows, num_experts)),
        np.zeros((num_windows, num_ranks)),
        np.zeros(num_ranks),
        np.zeros(num_slots, np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_ranks, num_experts), np.int8),
        np.zeros((num_ranks, num_experts), np.bool_),
        np.zeros((num_windows, num_slots)),
        np.zeros((num_windows, num_ranks)),
        np.zeros(num_slots, np.bool_),
        np.zeros(num_slots // num_ranks),
        np.zeros(num_slots // num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks),
        np.zeros(3, np.int64),
    )


@compiled
def _begin(walk, weights, slots, movable):
    width = len(slots) // walk.load.shape[1]
    walk.weights[:] = weights
    walk.slots[:] = slots
    walk.counts[:] = 0
    walk.held[:] = 0
    walk.before[:] = False
    walk.dirty[:] = 0
    walk.arrived[:] = False
    for slot in range(len(slots)):
        expert, rank = slots[slot], slot // width
        walk.ranks_of[expert, walk.counts[expert]] = rank
        walk.counts[expert] += 1
        walk.held[rank, expert] += 1
        walk.before[rank, expert] = True
    walk.held[:, movable:] = 1  # so that no rank can take one
    walk.load[:] = 0.0
    for window in range(len(weights)):
        walk.share[window] = weights[window] / walk.counts
        for slot in range(len(slots)):
            walk.slot_share[window, slot] = walk.share[window, slots[slot]]
            walk.load[window, slot // width] += walk.slot_share[window, slot]


@compiled
def _peak(walk):
    total = 0.0
    for window in range(len(walk.load)):
        total += walk.load[window].max()
    return total / len(walk.load)


@compiled
def _excess(load, threshold):
    over = load - threshold
    return over * over if over > 0.0 else 0.0


@compiled
def _price(copies):
    return TWO if copies == 2 else max(copies, FREE)


@compiled
def _find_move(walk, threshold, node_ranks):
    """Write the move with the largest drop of squared excess per copy to `walk.move`; False if none drops it."""
    width = len(walk.gain)
    for rank in range(walk.load.shape[1]):
        walk.excess[rank] = 0.0
        for window in range(len(walk.load)):
            walk.excess[rank] += _excess(walk.load[window, rank], threshold[window])
            walk.lightest[window, rank] = walk.slot_share[window, rank * width]
            for slot in range(rank * width + 1, (rank + 1) * width):
                walk.lightest[window, rank] = min(walk.lightest[window, rank], walk.slot_share[window, slot])
    if walk.excess.max() < NOISE:
        return False
    best = _find_swap(walk, threshold, node_ranks)
    return _find_replacement(walk, threshold, node_ranks, best) > 0.0


@compiled
def _find_swap(walk, threshold, node_ranks):
    """Exchange an expert of the busiest rank with another rank's; return the drop per copy, 0.0 for none.

    The rank that promises most comes first, then those that promise more than was found. One function, because
    passing two dozen arrays to a helper takes longer than what it has to do.
    """
    load, share, excess, slots, held = walk.load, walk.slot_share, walk.excess, walk.slots, walk.held
    before, arrived, gain, cost, promise = walk.before, walk.arrived, walk.gain, walk.cost, walk.change
    width, num_windows, hot = len(gain), len(load), excess.argmax()
    node = hot // node_ranks * node_ranks
    first = _promises(load, excess, threshold, hot, node, node_ranks, promise)
    best = 0.0
    for turn in range(node - 1, node + node_ranks):
        rank = turn if turn >= node else first
        least = FREE if walk.dirty[hot] or walk.dirty[rank] else TWO
        if rank == hot or turn == first or promise[rank] <= max(best * least, NOISE):
            continue
        start, lowest = rank * width, NEVER
        for j in range(width):
            theirs = slots[start + j]
            # What the busiest rank has already is no exchange: never worth it.
            cost[j] = NEVER if held[hot, theirs] else 1 - np.int64(before[hot, theirs]) - np.int64(arrived[start + j])
            lowest = min(lowest, cost[j])
        for slot in range(hot * width, (hot + 1) * width):
            mine = slots[slot]
            more = 1 - np.int64(before[rank, mine]) - np.int64(arrived[slot])
            least = max(best * _price(more + lowest), NOISE)
            top = excess[hot] + excess[rank]
            most = top
            for window in range(num_windows):  # to swap with the lightest there, or to halve the difference
                here, there = load[window, hot], load[window, rank]
                shift = min(share[window, slot] - walk.lightest[window, rank], (here - there) / 2)
                most -= _excess(here - shift, threshold[window]) + _excess(there + shift, threshold[window])
            if most <= least or held[rank, mine]:
                continue
            for j in range(width):
                gain[j] = top
            for window in range(num_windows):
                # What is over the threshold on either rank after the swap. No branch: several slots go at a time.
                kept = load[window, hot] - threshold[window] - share[window, slot]
                after = load[window, rank] - threshold[window] + share[window, slot]
                for j in range(width):
                    here, there = kept + share[window, start + j], after - share[window, start + j]
                    here = here if here > 0.0 else 0.0
                    there = there if there > 0.0 else 0.0
                    gain[j] -= here * here + there * there
            for j in range(width):
                if gain[j] > least and cost[j] < NEVER and gain[j] > best * _price(more + cost[j]):
                    best = gain[j] / _price(more + cost[j])
                    least = max(best * _price(more + lowest), NOISE)
                    walk.move[0], walk.move[1], walk.move[2] = SWAP, slot, start + j
    return best


@compiled
def _promises(load, excess, threshold, hot, node, node_ranks, promise):
    """Fill `promise` with what no swap of `hot` with a rank can surpass; return the rank with most, emptiest first."""
    first, emptiest = hot, 0.0
    promise[hot] = -1.0
    for rank in range(node, node + node_ranks):
        if rank == hot:
            continue
        total = 0.0
        promise[rank] = excess[hot] + excess[rank]
        for window in range(len(load)):  # the squares are convex, so two halves are least
            promise[rank] -= 2 * _excess((load[window, hot] + load[window, rank]) / 2, threshold[window])
            total += load[window, rank]
        if promise[rank] > promise[first] or (promise[rank] == promise[first] and total < emptiest):
            first, emptiest = rank, total
    return first


@compiled
def _find_replacement(walk, threshold, node_ranks, best):
    """Relieve the busiest rank by one replica more of an expert there, or one less; return the drop per copy.

    Where both experts have replicas on a rank, the gain there is more than the sum of their gains that counts here, so
    what is found can be a little less than the best. One function for the same reason as above.
    """
    load, weights, share, counts, ranks_of = walk.load, walk.weights, walk.share, walk.counts, walk.ranks_of
    excess, slots, width, more = walk.excess, walk.slots, len(walk.gain), walk.gain
    hot, most = excess.argmax(), 0.0
    node = hot // node_ranks * node_ranks
    for i in range(width):
        expert = slots[hot * width + i]
        more[i] = 0.0 if counts[expert] < node_ranks else -np.inf
        for window in range(len(load)):
            down = share[window, expert] / (counts[expert] + 1)
            for h in range(counts[expert]):
                here = load[window, ranks_of[expert, h]]
                more[i] += _excess(here, threshold[window]) - _excess(here - down, threshold[window])
        most = max(most, more[i])
    anything = FREE if walk.dirty.max() > 0 else 1.0
    for gone in range(len(counts)):
        count = counts[gone]
        if count < 2 or ranks_of[gone, 0] // node_ranks != node // node_ranks:
            continue
        fewer = 0.0  # without the replica the others carry more
        for window in range(len(load)):
            up = share[window, gone] / (count - 1)
            for h in range(count):
                here = load[window, ranks_of[gone, h]]
                fewer += _excess(here, threshold[window]) - _excess(here + up, threshold[window])
        for h in range(count):
            rank = ranks_of[gone, h]
            fixed = fewer + excess[rank]
            for window in range(len(load)):
                here, up = load[window, rank], share[window, gone] / (count - 1)
                fixed -= _excess(here, threshold[window]) - _excess(here + up, threshold[window])
            if fixed + (most if rank != hot else 0.0) <= max(best * anything, NOISE):
                continue
            fresh = walk.before[rank, gone]
            first, last = (hot, hot + 1) if rank != hot else (node, node + node_ranks)
            for at in range(first * width, last * width):
                expert = slots[at]
                gain = fixed + (more[at - hot * width] if rank != hot else 0.0)
                price = _price(np.int64(fresh) - np.int64(walk.before[rank, expert]))
                if gain <= max(best * price, NOISE) or walk.held[rank, expert] or counts[expert] == node_ranks:
                    continue
                for window in range(len(load)):
                    shift = weights[window, expert] / (counts[expert] + 1) - share[window, gone]
                    gain -= _excess(load[window, rank] + shift, threshold[window])
                if gain > max(best * price, NOISE):
                    best = gain / price
                    walk.move[0], walk.move[1], walk.move[2] = REPLACE, _slot_of(slots, gone, rank, width), expert
    return best


@compiled
def _slot_of(slots, expert, rank, width):
    for slot in range(rank * width, (rank + 1) * width):
        if slots[slot] == expert:
            return slot
    return -1


@compiled
def _changes(walk, window, slot, expert):
    """Fill `walk.change` with what replacing the replica in `slot` by `expert` adds to the ranks."""
    num_ranks = walk.load.shape[1]
    gone, rank = walk.slots[slot], slot // (len(walk.slots) // num_ranks)
    walk.change[:] = 0.0
    count = walk.counts[gone]
    up = walk.share[window, gone] / (count - 1)
    for i in range(count):
        walk.change[walk.ranks_of[gone, i]] += up
    walk.change[rank] -= walk.weights[window, gone] / (count - 1)
    count = walk.counts[expert]
    down = walk.share[window, expert] / (count + 1)
    for i in range(count):
        walk.change[walk.ranks_of[expert, i]] -= down
    walk.change[rank] += walk.weights[window, expert] / (count + 1)


@compiled
def _copies(walk, move):
    """Copies that `move` adds; negative when it takes copies back."""
    width = len(walk.slots) // walk.load.shape[1]
    rank, mine = move[1] // width, walk.slots[move[1]]
    if move[0] == REPLACE:
        return _new(walk, rank, move[2]) - _new(walk, rank, mine)
    other, theirs = move[2] // width, walk.slots[move[2]]
    added = _new(walk, rank, theirs) + _new(walk, other, mine)
    return added - _new(walk, rank, mine) - _new(walk, other, theirs)


@compiled
def _new(walk, rank, expert):
    return 0 if walk.before[rank, expert] else 1


@compiled
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
        walk.ranks_of[other, walk.counts[other]] = rank
        walk.counts[other] += 1
        walk.held[rank, mine] -= 1
        walk.held[rank, other] += 1
        walk.slots[slot] = other
        _mark(walk, slot)
        for window in range(len(walk.load)):
            for expert in (mine, other):
                walk.share[window, expert] = walk.weights[window, expert] / walk.counts[expert]
            for each in range(len(walk.slots)):
                if walk.slots[each] == mine or walk.slots[each] == other:
                    walk.slot_share[window, each] = walk.share[window, walk.slots[each]]
        return
    there, theirs = other // width, walk.slots[other]
    for window in range(len(walk.load)):
        shift = walk.share[window, mine] - walk.share[window, theirs]
        walk.load[window, rank] -= shift
        walk.load[window, there] += shift
        walk.slot_share[window, slot] -= shift
        walk.slot_share[window, other] += shift
    _leave(walk, mine, rank)
    walk.ranks_of[mine, walk.counts[mine] - 1] = there
    _leave(walk, theirs, there)
    walk.ranks_of[theirs, walk.counts[theirs] - 1] = rank
    for expert, off, on in ((mine, rank, there), (theirs, there, rank)):
        walk.held[off, expert] -= 1
        walk.held[on, expert] += 1
    walk.slots[slot], walk.slots[other] = theirs, mine
    _mark(walk, slot)
    _mark(walk, other)


@compiled
def _mark(walk, slot):
    """Another expert is in `slot`: note whether its rank held it before."""
    rank = slot // len(walk.gain)
    walk.dirty[rank] -= np.int64(walk.arrived[slot])
    walk.arrived[slot] = not walk.before[rank, walk.slots[slot]]
    walk.dirty[rank] += np.int64(walk.arrived[slot])


@compiled
def _leave(walk, expert, rank):
    """Take `rank` out of the expert's ranks; the last one takes its place in the list."""
    last = walk.counts[expert] - 1
    for i in range(last):
        if walk.ranks_of[expert, i] == rank:
            walk.ranks_of[expert, i] = walk.ranks_of[expert, last]
            return
