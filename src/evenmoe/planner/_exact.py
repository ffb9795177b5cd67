"""Counts and packing together by exhaustive search, for layers of few slots: serial, compiled.

Ranks are filled one after another; an expert's number of replicas is decided when it is first used, so all counts
that agree on the experts used so far share one branch. Two facts keep the tree small: each rank starts with the
heaviest unfinished expert, and whatever a rank falls short of the cap the others must take up. On Llama-4's shape
(16 experts, 24 slots, 8 ranks) a layer takes about 250,000 nodes, 10 ms, where CP-SAT proves nothing in minutes.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled


@compiled
def improve(loads, floor, peak, nodes, slots):
    """Search for a placement of `loads` (E,), descending, below `peak`; return (its peak, a proven floor).

    Starts just above `floor`, which no placement undercuts, and doubles the gap: an infeasible small gap is cheap to
    prove. Gives up after `nodes` nodes. `slots` (G, width) is replaced when something better is found.
    """
    gap = 0.002 * floor
    while peak > floor * (1 + 1e-9):
        cap = min(floor + gap, peak * (1 - 1e-9))
        last = floor + gap >= peak
        found, used = search(loads, cap, nodes, slots)
        nodes -= used
        if nodes < 0:
            return min(peak, found), floor
        floor = min(cap, found)
        peak = min(peak, found)
        if last or found <= cap:
            return peak, peak
        gap *= 2
    return peak, floor


@compiled
def search(loads, cap, nodes, slots):
    """The best placement within `cap`, into `slots`: (its peak or infinity, nodes used: over `nodes` if cut off).

    One function, because passing a dozen arrays to helpers trebles the time of a node (40 ns).
    """
    num_experts, (num_ranks, width) = loads.size, slots.shape
    counts = np.zeros(num_experts, np.int64)  # replicas, 0 while undecided
    left = np.zeros(num_experts, np.int64)  # replicas still to place
    least = np.empty(num_experts, np.int64)  # replicas without which a replica alone exceeds the cap
    most = np.zeros(num_experts + 1, np.float64)  # heaviest replica that this expert or a later one can have
    chosen = np.zeros(num_ranks * width, np.int64) - 1  # expert of each slot, -1 before the first try
    decides = np.zeros(num_ranks * width, np.bool_)  # whether that choice decided the expert's count
    filled = np.zeros(num_ranks * width, np.float64)  # tokens of the rank up to this slot
    packed = np.zeros(num_ranks + 1, np.float64)  # tokens of all ranks before this one
    peak = np.zeros(num_ranks + 1, np.float64)  # busiest of them
    spare = set_cap(loads, cap, counts, least, most, num_ranks * width)  # replicas neither decided nor in `least`
    total, best, undecided = loads.sum(), np.inf, num_experts
    rank = slot = used = 0
    while rank >= 0 and used <= nodes:
        used += 1
        at = rank * width + slot
        expert, count, now = chosen[at], 0, np.inf
        if expert >= 0:  # take the last choice back
            left[expert] += 1
            if decides[at]:
                count = counts[expert]
                counts[expert] = left[expert] = 0
                spare += count - least[expert]
                undecided += 1
        need = total * (1 - 1e-12) - packed[rank] - (num_ranks - 1 - rank) * cap  # what later ranks cannot take
        if peak[rank] <= cap and need <= cap:
            before = filled[at - 1] if slot > 0 else 0.0
            step = 1 if slot > 0 else num_experts  # the first expert of a rank is given
            if expert < 0:
                expert = first_choice(rank, slot, width, chosen, counts, left)
            elif count == 0:
                expert += step
            while expert < num_experts:
                now = np.inf
                if counts[expert] == 0:
                    top = min(num_ranks - rank, least[expert] + spare)
                    count = max(count + 1, least[expert] + spare if undecided == 1 else least[expert])
                    while count <= top and before + loads[expert] / count > cap:
                        count += 1
                    if count <= top:
                        now = before + loads[expert] / count
                elif left[expert] > 0:
                    now = before + loads[expert] / counts[expert]
                if now <= cap and now + (width - 1 - slot) * most[expert + 1] >= need:
                    break
                now = np.inf
                expert, count = expert + step, 0
        if now > cap:
            chosen[at] = -1
            rank, slot = (rank, slot - 1) if slot > 0 else (rank - 1, width - 1)
            continue
        chosen[at], filled[at], decides[at] = expert, now, counts[expert] == 0
        if decides[at]:
            counts[expert] = left[expert] = count
            spare -= count - least[expert]
            undecided -= 1
        left[expert] -= 1
        if slot < width - 1:
            slot += 1
        else:
            packed[rank + 1], peak[rank + 1] = packed[rank] + now, max(peak[rank], now)
            if rank == num_ranks - 1:
                best = peak[num_ranks]
                for each in range(num_ranks * width):
                    slots[each // width, each % width] = chosen[each]
                cap = best * (1 - 1e-9)
                spare = set_cap(loads, cap, counts, least, most, num_ranks * width)
                continue
            rank, slot = rank + 1, 0
        chosen[rank * width + slot] = -1
    return best, used


@compiled
def set_cap(loads, cap, counts, least, most, num_slots):
    """Fill `least` and `most` for a cap; return the replicas that are neither decided nor needed."""
    for expert in range(loads.size - 1, -1, -1):
        least[expert] = max(1, int(np.ceil(loads[expert] / cap)))
        most[expert] = max(most[expert + 1], loads[expert] / least[expert])
        num_slots -= counts[expert] if counts[expert] > 0 else least[expert]
    return num_slots


@compiled
def first_choice(rank, slot, width, chosen, counts, left):
    """A rank starts with the heaviest unfinished expert, then ids rise; equal firsts rise in the second, too."""
    at = rank * width + slot
    if slot == 0:
        expert = 0
        while counts[expert] > 0 and left[expert] == 0:
            expert += 1
        return expert
    expert = chosen[at - 1] + 1
    if slot == 1 and rank > 0 and chosen[at - 1] == chosen[at - 1 - width]:
        expert = max(expert, chosen[at - width])
    return expert
