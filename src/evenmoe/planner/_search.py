"""One layer at a time: replica counts, packing, and the swaps that even the ranks out. Serial, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def replica_counts(tokens, num_slots, most, counts):
    """Fill `counts` (E,) so that the largest load per replica is least: each extra slot to the largest load / count.

    Optimal for that goal (D'Hondt's divisor method: exchange argument), with at most `most` replicas each.
    """
    counts[:] = 1
    for _ in range(num_slots - tokens.size):
        best, share = -1, -1.0
        for expert in range(tokens.size):
            if counts[expert] < most and tokens[expert] > share * counts[expert]:
                best, share = expert, tokens[expert] / counts[expert]
        counts[best] += 1


@njit(cache=True, nogil=True)
def pack(share, counts, num_ranks, width, held, loads, has):
    """Heaviest replica first onto the lightest rank with a free slot that does not hold the expert yet."""
    loads[:] = 0.0
    has[:] = 0
    used = np.zeros(num_ranks, np.int32)
    for expert in np.argsort(-share, kind="mergesort"):
        for _ in range(counts[expert]):
            best = -1
            for rank in range(num_ranks):
                if used[rank] < width and not has[expert, rank] and (best < 0 or loads[rank] < loads[best]):
                    best = rank
            if best < 0:
                best = make_room(expert, share, num_ranks, width, held, loads, has, used)
            held[best, used[best]] = expert
            used[best] += 1
            has[expert, best] = 1
            loads[best] += share[expert]


@njit(cache=True, nogil=True)
def make_room(expert, share, num_ranks, width, held, loads, has, used):
    """Every rank with a free slot holds `expert`: move another expert there from a full rank, and return that rank.

    One always exists: a full rank without `expert` holds `width` experts, the rank with the free slot fewer.
    """
    free = 0
    while used[free] == width:
        free += 1
    for rank in range(num_ranks):
        if has[expert, rank]:
            continue
        for slot in range(width):
            moved = held[rank, slot]
            if not has[moved, free]:
                held[free, used[free]] = moved
                used[free] += 1
                has[moved, free], has[moved, rank] = 1, 0
                loads[free] += share[moved]
                loads[rank] -= share[moved]
                held[rank, slot] = held[rank, width - 1]
                used[rank] -= 1
                return rank
    return -1


@njit(cache=True, nogil=True)
def best_swap(hot, share, num_ranks, width, held, loads, has):
    """The swap with another rank after which the heavier of the two is lightest: (its load, rank, slot, slot)."""
    best = (loads[hot], -1, -1, -1)
    for rank in range(num_ranks):
        gap = loads[hot] - loads[rank]
        for mine in range(width):
            out = held[hot, mine]
            if rank == hot or has[out, rank]:
                continue
            for theirs in range(width):
                step = share[out] - share[held[rank, theirs]]
                if 0 < step < gap:
                    peak = max(loads[hot] - step, loads[rank] + step)
                    if peak < best[0] and not has[held[rank, theirs], hot]:
                        best = (peak, rank, mine, theirs)
    return best


@njit(cache=True, nogil=True)
def even_out(share, num_ranks, width, held, loads, has, goal):
    """Swap between the hottest rank and another until no swap lowers the pair's peak or it is within `goal`."""
    while True:
        hot = np.argmax(loads)
        if loads[hot] <= goal:
            return
        peak, rank, mine, theirs = best_swap(hot, share, num_ranks, width, held, loads, has)
        if rank < 0 or peak >= loads[hot] * (1 - 1e-12):
            return
        out, into = held[hot, mine], held[rank, theirs]
        held[hot, mine], held[rank, theirs] = into, out
        has[out, hot], has[into, hot], has[out, rank], has[into, rank] = 0, 1, 1, 0
        step = share[out] - share[into]
        loads[hot] -= step
        loads[rank] += step


@njit(cache=True, nogil=True)
def plan_layers(load, num_ranks, num_slots, seed, slots):
    width = num_slots // num_ranks
    num_experts = load.shape[1]
    counts = np.empty(num_experts, np.int32)
    held = np.empty((num_ranks, width), np.int32)
    loads = np.empty(num_ranks, np.float64)
    has = np.empty((num_experts, num_ranks), np.uint8)
    for layer in range(load.shape[0]):
        replica_counts(load[layer], num_slots, num_ranks, counts)
        share = load[layer] / counts
        pack(share, counts, num_ranks, width, held, loads, has)
        even_out(share, num_ranks, width, held, loads, has, loads.mean() * 1.0005)
        slots[layer] = held.ravel()
