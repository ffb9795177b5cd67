"""First drafts of a placement for the `batch` rule, compiled: replicas that link the ranks, then the single experts."""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled


@compiled
def count_replicas(weight, num_slots, most):
    """Replicas int64 (E,): one each, then every further slot to the largest weight per replica, at most `most` each."""
    counts = np.ones(weight.size, np.int64)
    for _ in range(num_slots - weight.size):
        best = -1
        for expert in range(weight.size):
            if counts[expert] < most and (best < 0 or weight[expert] * counts[best] > weight[best] * counts[expert]):
                best = expert
        counts[best] += 1
    return counts


@compiled
def _least(keys, used, width, has):
    """The rank with the lowest key among those with a free slot and without the expert, or −1."""
    best = -1
    for rank in range(keys.size):
        if used[rank] < width and not has[rank] and (best < 0 or keys[rank] < keys[best]):
            best = rank
    return best


@compiled
def draft(load, spread, order, counts, priority, reserve, caution, held):
    """Fill `held` (G, n) with a placement whose replicas link as many ranks as they can; returns whether it came out.

    Replicated experts come first, hottest first. Each takes one rank that is linked already and then fresh ones, so
    that G − 1 extra replicas link all G ranks into one tree; the ranks in two experts pass load from one to the other.
    Single experts follow, heaviest first, each to the rank that is least loaded counting `reserve` mean rank loads for
    every link, since a rank can pass on only what its single experts leave free, and `caution` standard deviations
    of its single experts as if they varied independently.

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
            rank = _least(keys, used, width, has)
            if rank < 0:
                return False
            held[rank, used[rank]] = expert
            used[rank] += 1
            has[rank] = True
        turn += 7  # so that one priority serves all experts
    total = np.empty(num_ranks)
    for rank in range(num_ranks):
        total[rank] = reserve * abs(used[rank] - 1)
    variance = np.zeros(num_ranks)
    has[:] = False
    for expert in order:
        if counts[expert] == 1:
            more = spread[expert] ** 2
            for rank in range(num_ranks):
                keys[rank] = total[rank] + caution * np.sqrt(variance[rank] + more)
            rank = _least(keys, used, width, has)
            held[rank, used[rank]] = expert
            used[rank] += 1
            total[rank] += load[expert]
            variance[rank] += more
    return True
