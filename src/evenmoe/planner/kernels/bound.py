"""Peaks that no placement can undercut, by necessary conditions (proved in `planner.bound`), and by exhaustive search.

The search decides counts and packing together. Ranks are filled one after another; an expert's number of replicas is
decided when it is first used, so all counts that agree on the experts used so far share one branch. Two facts keep the
tree small: each rank starts with the heaviest unfinished expert, and whatever a rank falls short of the cap the others
must take up. On Llama-4's shape (16 experts, 24 slots, 8 ranks) a layer takes about 250,000 nodes, 10 ms, where CP-SAT
proves nothing in minutes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled


class Least(NamedTuple):
    """Scratch: what every placement within the peak has at least, and the sums that the tests read off it."""

    counts: npt.NDArray[np.int64]  # (E,) replicas that each expert _needs
    parts: npt.NDArray[np.int64]  # (E,) pieces of the lightest experts beside another
    replica: npt.NDArray[np.float64]  # (S,) tokens per replica at these counts, ascending
    lightest: npt.NDArray[np.float64]  # (S + 1,) sum of the n lightest replicas
    touched: npt.NDArray[np.int64]  # (E + 1,) no n experts have more replicas than this


@compiled
def lower_bounds(loads, num_ranks, width, peaks):
    """Replace `peaks` (L,) by tokens that the busiest rank of no placement of the row (L, E) can undercut.

    Rows of `loads` descend. `peaks` comes with the highest value of interest: a row whose bound is as high keeps it.
    """
    num_experts, num_slots = loads.shape[1], num_ranks * width
    least = Least(
        np.zeros(num_experts, np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros(num_slots),
        np.zeros(num_slots + 1),
        np.zeros(num_experts + 1, np.int64),
    )
    for row in range(loads.shape[0]):
        low, high = 0.0, peaks[row]
        for expert in range(loads.shape[1]):
            low += loads[row, expert] / num_ranks
        if low >= high or low == 0.0:
            peaks[row] = min(low, high)
            continue
        if width >= loads.shape[1] or _may_fit(loads[row], num_ranks, width, low, least):
            peaks[row] = low
            continue
        if not _may_fit(loads[row], num_ranks, width, high, least):
            continue
        while high - low > low * 1e-10:
            middle = (low + high) / 2 if high <= 2 * low else 2 * low
            if _may_fit(loads[row], num_ranks, width, middle, least):
                high = middle
            else:
                low = middle
        peaks[row] = low


@compiled
def _may_fit(loads, num_ranks, width, peak, least):
    """False only if no placement of `loads` (E,), descending, keeps every rank within `peak`."""
    start = 0
    while start < loads.size:
        on_every_rank = _needs(loads[start:], num_ranks, width, peak, least)
        if on_every_rank <= 0:
            return on_every_rank == 0
        for expert in range(start, start + on_every_rank):
            peak -= loads[expert] / num_ranks
        start += on_every_rank
        width -= on_every_rank
        if peak <= 0:
            return start == loads.size or loads[start] == 0
    return True


@compiled
def _needs(loads, num_ranks, width, peak, least):
    """-1 if nothing fits, else the number of experts, the heaviest ones, that every rank must hold."""
    counts, num_experts = least.counts, loads.size
    spare, before = num_ranks * width - num_experts, -1
    for expert in range(num_experts):
        counts[expert] = 1
    while spare != before:  # the fewer replicas are left to spare, the heavier what is lightest beside another
        before = spare
        room = peak - _lightest_beside(loads, width - 1, spare, least)
        for expert in range(num_experts):
            needed = int(np.ceil(loads[expert] / room * (1 - 1e-14))) if room > 0 else num_ranks + 1
            if needed > counts[expert]:
                spare -= needed - counts[expert]
                counts[expert] = needed
                if needed > num_ranks or spare < 0:
                    return -1
    while True:
        number = _ascend(loads, True, least)
        for i in range(number):
            least.lightest[i + 1] = least.lightest[i] + least.replica[i]
        before = spare
        for expert in range(num_experts):
            beside = least.lightest[max(0, counts[expert] * (width - 1) - before)]
            if loads[expert] + beside > counts[expert] * peak * (1 + 1e-14):
                counts[expert] += 1
                spare -= 1
                if counts[expert] > num_ranks or spare < 0:
                    return -1
        while spare >= 0 and _excludes_too_many(loads, num_ranks, width, peak * (1 + 1e-14), spare, least):
            counts[0] += 1
            spare -= 1
        if counts[0] > num_ranks or spare < 0:
            return -1
        if spare == before:
            break
    if _heaviest_cannot_fit(loads.size, num_ranks, width, peak * (1 + 1e-14), spare, least):
        return -1
    full = 0
    while full < num_experts and num_ranks > 1 and counts[full] == num_ranks:
        full += 1
    return full


@compiled
def _ascend(loads, every, least):
    """Fill `least.replica` with each expert's share, once or `every` replica's, ascending; return how many."""
    size = 0
    for expert in range(loads.size - 1, -1, -1):  # unsplit experts come in order, so little is moved
        share = loads[expert] / least.counts[expert]
        copies = least.counts[expert] if every else 1
        at = size
        while at > 0 and least.replica[at - 1] > share:
            least.replica[at + copies - 1] = least.replica[at - 1]
            at -= 1
        for i in range(copies):
            least.replica[at + i] = share
        size += copies
    return size


@compiled
def _lightest_beside(loads, number, spare, least):
    """The least that `number` different experts can weigh when `spare` replicas more are dealt out among them."""
    _ascend(loads, False, least)
    for i in range(number):
        least.parts[i] = 1
    for _ in range(spare if number > 0 else 0):
        best, gain = 0, -1.0
        for i in range(number):
            saved = least.replica[i] / (least.parts[i] * (least.parts[i] + 1))
            if saved > gain:
                best, gain = i, saved
        least.parts[best] += 1
    weight = 0.0
    for i in range(number):
        weight += least.replica[i] / least.parts[i]
    return weight


@compiled
def _excludes_too_many(loads, num_ranks, width, peak, spare, least):
    """Whether the heaviest expert at its count leaves too few other ranks for what does not fit beside it."""
    count = least.counts[0]
    if count > num_ranks or num_ranks == 1:
        return False
    beside = least.lightest[max(0, width - 2 - spare)]
    room = peak - loads[0] / count - beside
    outside = -(num_ranks - count) * peak  # more than 0 of it finds no rank
    for expert in range(1, loads.size):
        if loads[expert] > room * least.counts[expert]:
            outside += loads[expert]
    rest, limit = spare, np.inf
    while (
        outside > 1e-9 * peak and rest > 0 and room > 0
    ):  # the best that spare replicas can do: each on the most load it frees
        best, most = 0, 0.0
        for expert in range(1, loads.size):
            if loads[expert] > room * least.counts[expert]:
                parts = int(np.ceil(loads[expert] / room * (1 - 1e-14))) - least.counts[expert]
                value = loads[expert] / max(parts, 1)
                if most < value < limit:
                    best, most = expert, value
        if best == 0:
            break
        limit = most
        for expert in range(1, loads.size):  # those of one value together
            if loads[expert] > room * least.counts[expert]:
                parts = max(int(np.ceil(loads[expert] / room * (1 - 1e-14))) - least.counts[expert], 1)
                if loads[expert] / parts == most and rest > 0:
                    outside -= most * min(parts, rest)
                    rest -= min(parts, rest)
    return outside > 1e-9 * peak  # less is the rounding of the sum


@compiled
def _heaviest_cannot_fit(num_experts, num_ranks, width, peak, spare, least):
    """Whether the heaviest replicas cannot all find ranks, however the spare replicas are dealt out."""
    number, cuts = num_ranks * width - spare, min(spare, num_experts)
    most = 0
    for expert in range(num_experts - 1, -1, -1):  # counts descend but for those raised last: their envelope
        most = max(most, least.counts[expert])
        least.touched[expert + 1] = most
    for expert in range(num_experts):
        least.touched[expert + 1] += least.touched[expert]
    whole = num_ranks - least.touched[cuts] - spare  # ranks without a replica that a spare one has made lighter
    if whole > 0 and least.lightest[whole * width] > whole * peak:
        return True
    for top in range(1, min(number, num_ranks + 1 + least.touched[cuts]) + 1):
        lightest_top = least.replica[number - top]
        may_share = width > 1 and 2 * lightest_top + least.lightest[max(0, width - 2 - spare)] <= peak
        fits = False
        for cut in range(cuts + 1):
            left = top - least.touched[cut]  # replicas among the top ones that no spare replica has made lighter
            if left < 1 or (left > 1 and may_share):
                fits = True
                break
            beside = left * (width - 1) - spare
            weight = least.lightest[number - top + left] - least.lightest[number - top]
            if left > num_ranks or weight + least.lightest[max(0, beside)] > left * peak:
                continue
            pair = beside - least.touched[cuts] if width == 2 else 0
            if pair < 1 or lightest_top + least.replica[pair - 1] <= peak:
                fits = True
                break
        if not fits:
            return True
    return False


@compiled
def search_exhaustively(loads, floor, peak, nodes, slots):
    """Search for a placement of `loads` (E,), descending, below `peak`; return (its peak, a proven floor).

    Starts just above `floor`, which no placement undercuts, and doubles the gap: an infeasible small gap is cheap to
    prove. Gives up after `nodes` nodes. `slots` (G, width) is replaced when something better is found.
    """
    gap = 0.002 * floor
    while peak > floor * (1 + 1e-9):
        cap = min(floor + gap, peak * (1 - 1e-9))
        last = floor + gap >= peak
        found, used = _search(loads, cap, nodes, slots)
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
def _search(loads, cap, nodes, slots):
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
    spare = _set_cap(loads, cap, counts, least, most, num_ranks * width)  # replicas neither decided nor in `least`
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
                expert = _first_choice(rank, slot, width, chosen, counts, left)
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
                spare = _set_cap(loads, cap, counts, least, most, num_ranks * width)
                continue
            rank, slot = rank + 1, 0
        chosen[rank * width + slot] = -1
    return best, used


@compiled
def _set_cap(loads, cap, counts, least, most, num_slots):
    """Fill `least` and `most` for a cap; return the replicas that are neither decided nor needed."""
    for expert in range(loads.size - 1, -1, -1):
        least[expert] = max(1, int(np.ceil(loads[expert] / cap)))
        most[expert] = max(most[expert + 1], loads[expert] / least[expert])
        num_slots -= counts[expert] if counts[expert] > 0 else least[expert]
    return num_slots


@compiled
def _first_choice(rank, slot, width, chosen, counts, left):
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
