"""What several searches need: random numbers, replica counts, the lightest rank, slots that keep what stays."""

from __future__ import annotations

import numpy as np

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
