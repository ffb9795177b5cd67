"""Replica counts, replicas packed heaviest first onto the lightest rank, and what other searches need of that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled


@compiled
def draw(random, limit):
    """A number below `limit`, and the next state of the xorshift generator (Marsaglia 2003, 64 bits)."""
    state = random[0]
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)
    random[0] = state
    return np.int64(((state >> np.uint64(33)) * np.uint64(limit)) >> np.uint64(31))


@compiled
def replicate(load, num_slots, most):
    """One replica each, then every further one to the largest load per replica, at most `most` each.

    Returns the expert of each replica, int64 (S,), the first E being 0…E-1, and the replicas of each, int64 (E,).
    """
    counts = np.ones(load.size, np.int64)
    owner = np.arange(num_slots)
    for replica in range(load.size, num_slots):
        best = -1
        for expert in range(load.size):
            if counts[expert] < most and (best < 0 or load[expert] * counts[best] > load[best] * counts[expert]):
                best = expert
        owner[replica] = best
        counts[best] += 1
    return owner, counts


@compiled
def lightest(load, used, width, barred):
    """The rank with the lowest load among those with a free slot that are not barred, or -1."""
    best = -1
    for rank in range(load.size):
        if used[rank] < width and not barred[rank] and (best < 0 or load[rank] < load[best]):
            best = rank
    return best


@compiled
def held_experts(held, num_experts):
    """Whether each rank holds each expert in some slot, (G, n) -> bool (G, E)."""
    has = np.zeros((held.shape[0], num_experts), np.bool_)
    for rank in range(held.shape[0]):
        for slot in range(held.shape[1]):
            has[rank, held[rank, slot]] = True
    return has


@compiled
def keep_slots(slots, num_ranks, ordered):
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


class Bins(NamedTuple):
    """The ranks while they fill."""

    held: npt.NDArray[np.int64]  # (G, width) experts, in the order they came
    room: npt.NDArray[np.int64]  # (G,) slots
    used: npt.NDArray[np.int64]  # (G,) filled slots
    load: npt.NDArray[np.float64]  # (G,) tokens


@compiled
def pack_layers(load, order, room, caution, slots):
    """Fill the first `room` (G,) slots of each rank of `slots` (L, G, width) with a first plan of each row of `load`.

    When replicas are given out, an expert of u mean expert loads counts as u + `caution` √u.

    `load` is (L, E). `order` (L, E) sorts each row descending; equal loads are put in ascending order of expert here,
    whatever sort was used. Experts are named by their position in it, so the plan cannot depend on their ids.
    """
    num_ranks = slots.shape[1]
    num_experts = load.shape[1]
    loads = np.empty(num_experts, np.float64)
    keys = np.empty(num_experts, np.float64)
    counts = np.empty(num_experts, np.int64)
    share = np.empty(num_experts, np.float64)
    queue = np.empty(num_experts, np.int64)
    for row in range(load.shape[0]):
        _sort_ties(load[row], order[row])
        for position in range(num_experts):
            loads[position] = load[row, order[row, position]]
        risk_keys(loads, num_experts, caution, keys)
        _replicate(keys, room.sum() - num_experts, num_ranks, counts, share)
        for expert in range(num_experts):
            share[expert] = loads[expert] / counts[expert]
        sort_by_share(share, queue)
        pack(queue, counts, share, Bins(slots[row], room, np.zeros(num_ranks, np.int64), np.zeros(num_ranks)))


@compiled
def _sort_ties(load, order):
    """Put experts of equal load in ascending order."""
    for end in range(1, order.size):
        expert = order[end]
        at = end
        while at > 0 and order[at - 1] > expert and load[order[at - 1]] == load[expert]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = expert


@compiled
def risk_keys(loads, number, caution, keys):
    """Fill `keys` with u + `caution` √u of the first `number` experts, u in their mean load."""
    mean = 0.0
    for expert in range(number):
        mean += loads[expert] / number
    for expert in range(number):
        load = loads[expert] / mean if mean > 0 else 0.0
        keys[expert] = load + caution * np.sqrt(load)


@compiled
def _replicate(loads, spare, most, counts, share):
    """Give each of the `spare` replicas to the largest load per replica, at most `most` to one expert.

    That makes the largest load per replica as small as it can be (D'Hondt's divisors; a replica anywhere else leaves
    the largest as it was). Ties go to the expert with fewer replicas, then to the smaller position, so a layer
    without load spreads its replicas. Fills `counts` and `share`, the load of a replica.
    """
    for expert in range(loads.size):
        counts[expert] = 1
        share[expert] = loads[expert]
    split = 0  # experts with several replicas are a prefix, since `loads` descends
    for _ in range(spare):
        best = split if split < loads.size else 0
        while counts[best] == most:
            best += 1
        for expert in range(split):
            if counts[expert] < most and (
                share[expert] > share[best] or (share[expert] == share[best] and counts[expert] < counts[best])
            ):
                best = expert
        counts[best] += 1
        share[best] = loads[best] / counts[best]
        split = max(split, best + 1)


@compiled
def sort_by_share(share, queue):
    """Fill `queue` with the experts by descending share; few of them are out of order.

    What comes with one replica is in order already, so the rest is inserted, last first.
    """
    for expert in range(share.size - 1, -1, -1):
        place = expert
        while place + 1 < share.size and share[queue[place + 1]] > share[expert]:
            queue[place] = queue[place + 1]
            place += 1
        queue[place] = expert


@compiled
def pack(queue, counts, share, bins):
    """Heaviest replica first, onto the lightest ranks that have a free slot; an expert's replicas at once, apart."""
    num_ranks = bins.room.size
    heap = np.empty(num_ranks, np.int64)  # ranks with a free slot, a binary heap on (load, rank)
    taken = np.empty(num_ranks, np.int64)
    free = _refill(heap, bins)
    for place in range(queue.size):
        expert = queue[place]
        if counts[expert] == 1 and free > 0:
            rank = heap[0]
            _append(rank, expert, share[expert], bins)
            if bins.used[rank] == bins.room[rank]:
                free -= 1
                heap[0] = heap[free]
            _sift_down(heap, free, bins.load)
            continue
        apart = min(counts[expert], free)
        for i in range(apart):
            taken[i] = heap[0]
            free -= 1
            heap[0] = heap[free]
            _sift_down(heap, free, bins.load)
        for i in range(apart):
            _append(taken[i], expert, share[expert], bins)
            if bins.used[taken[i]] < bins.room[taken[i]]:
                _sift_up(heap, free, taken[i], bins.load)
                free += 1
        for _ in range(counts[expert] - apart):
            if not _make_room(expert, share, bins):
                counts[expert] -= 1
            free = _refill(heap, bins)
    _fill_up(queue, share, bins)


@compiled
def _fill_up(queue, share, bins):
    """Fill the slots that are left, where room is uneven, with the heaviest replicas that their rank lacks."""
    for rank in range(bins.room.size):
        for place in range(queue.size):
            if bins.used[rank] == bins.room[rank]:
                break
            if not _holds(rank, queue[place], bins):
                _append(rank, queue[place], share[queue[place]], bins)


@compiled
def _refill(heap, bins):
    """Fill the heap with all ranks that have a free slot; return how many."""
    free = 0
    for rank in range(bins.room.size):
        if bins.used[rank] < bins.room[rank]:
            _sift_up(heap, free, rank, bins.load)
            free += 1
    return free


@compiled
def _append(rank, expert, share, bins):
    bins.held[rank, bins.used[rank]] = expert
    bins.used[rank] += 1
    bins.load[rank] += share


@compiled
def _sift_down(heap, size, load):
    """Restore the heap below its root."""
    rank = heap[0]
    place = 0
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _lighter(heap[child + 1], heap[child], load):
            child += 1
        if not _lighter(heap[child], rank, load):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = rank


@compiled
def _sift_up(heap, size, rank, load):
    """Add `rank` to a heap of `size`."""
    place = size
    while place > 0 and _lighter(rank, heap[(place - 1) // 2], load):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = rank


@compiled
def _lighter(rank, other, load):
    return load[rank] < load[other] or (load[rank] == load[other] and rank < other)


@compiled
def _make_room(expert, share, bins):
    """Place `expert` although every rank with a free slot holds it: move another expert out of a full rank.

    The lightest rank is taken that has one to move, and of its experts the one nearest in share. Where no rank is wider
    than another by two slots, one can always be moved: a full rank without `expert` holds more experts than a rank with
    a free slot has beside `expert`, so one of its experts is missing there. Returns whether one was.
    """
    target, full, moved_slot = -1, -1, -1
    for rank in range(bins.room.size):
        if bins.used[rank] < bins.room[rank] and (target < 0 or bins.load[rank] < bins.load[target]):
            target = rank
    for rank in range(bins.room.size):
        if bins.used[rank] < bins.room[rank] or (full >= 0 and bins.load[rank] >= bins.load[full]):
            continue
        if _holds(rank, expert, bins):
            continue
        nearest = -1
        for slot in range(bins.room[rank]):
            if not _holds(target, bins.held[rank, slot], bins):
                miss = abs(share[bins.held[rank, slot]] - share[expert])
                if nearest < 0 or miss < abs(share[bins.held[rank, nearest]] - share[expert]):
                    nearest = slot
        if nearest >= 0:
            full, moved_slot = rank, nearest
    if full < 0:
        return False
    moved = bins.held[full, moved_slot]
    bins.held[full, moved_slot] = expert
    bins.load[full] += share[expert] - share[moved]
    _append(target, moved, share[moved], bins)
    return True


@compiled
def _holds(rank, expert, bins):
    for slot in range(bins.used[rank]):  # noqa: SIM110 (any() of a generator is not for compiled code)
        if bins.held[rank, slot] == expert:
            return True
    return False


@compiled
def pack_evenly(weights, num_bins):
    """Which items each bin gets, int64 (bins, items / bins): heaviest first, to the lightest bin that has room."""
    width = weights.size // num_bins
    held = np.empty((num_bins, width), np.int64)
    used = np.zeros(num_bins, np.int64)
    total = np.zeros(num_bins)
    barred = np.zeros(num_bins, np.bool_)
    for item in np.argsort(-weights, kind="mergesort"):
        best = lightest(total, used, width, barred)
        held[best, used[best]] = item
        used[best] += 1
        total[best] += weights[item]
    return held


@compiled
def draft(load, spread, order, counts, priority, slack, regularization, held):
    """Fill `held` (G, n) with a placement whose replicas link as many ranks as they can; returns whether it came out.

    Replicated experts come first, heaviest first. Each takes one rank that is linked already and then fresh ones, so
    that G − 1 extra replicas link all G ranks into one tree; the ranks in two experts pass load from one to the other.
    Single experts follow, heaviest first, each to the rank that is least loaded counting `slack` mean rank loads for
    every link, since a rank can pass on only what its single experts leave free, and `regularization` standard
    deviations of its single experts as if they varied independently.

    Args:
        load: float64 (E,), mean rank load 1.
        spread: float64 (E,), standard deviation of each.
        order: int64 (E,), experts by falling load.
        counts: int64 (E,), replicas, adding up to G · n, at most G each.
        priority: float64 (G,) in 0…1, decides between ranks with equally many links.
        held: int64 (G, n), filled.
    """
    num_ranks, width = held.shape
    used = np.zeros(num_ranks, np.int64)
    has = np.zeros(num_ranks, np.bool_)
    keys = np.empty(num_ranks)
    turn = 0
    for expert in order:
        if counts[expert] == 1:
            continue
        has[:] = False
        for replica in range(counts[expert]):
            for rank in range(num_ranks):
                # The first replica prefers a linked rank, the others a fresh one; then few links, then the priority.
                keys[rank] = used[rank] + priority[(rank + turn) % num_ranks]
                if replica == 0 and used[rank] == 0:
                    keys[rank] += width + 1
            rank = lightest(keys, used, width, has)
            if rank < 0:
                return False
            held[rank, used[rank]] = expert
            used[rank] += 1
            has[rank] = True
        turn += 7  # so that one priority serves all experts
    total = np.empty(num_ranks)
    for rank in range(num_ranks):
        total[rank] = slack * abs(used[rank] - 1)
    variance = np.zeros(num_ranks)
    has[:] = False
    for expert in order:
        if counts[expert] == 1:
            more = spread[expert] ** 2
            for rank in range(num_ranks):
                keys[rank] = total[rank] + regularization * np.sqrt(variance[rank] + more)
            rank = lightest(keys, used, width, has)
            held[rank, used[rank]] = expert
            used[rank] += 1
            total[rank] += load[expert]
            variance[rank] += more
    return True
