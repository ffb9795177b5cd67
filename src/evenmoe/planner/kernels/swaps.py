"""Local search from a placement, one layer at a time: serial, compiled, arrays in and arrays out.

Experts are positions in descending order of load, so the result cannot depend on their names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled, compiled_inner
from evenmoe.planner.kernels.packing import draw


class SwapState(NamedTuple):
    """One layer under way: who is where, and how much every rank carries."""

    held: npt.NDArray[np.int64]  # (G, width) experts of each rank, heaviest replica first
    share: npt.NDArray[np.float64]  # (G, width) tokens per replica, in step with `held`
    load: npt.NDArray[np.float64]  # (G,) tokens per rank
    counts: npt.NDArray[np.int64]  # (E,) replicas per expert
    line: npt.NDArray[np.int64]  # (G,) ranks, lightest first; `_even_out` keeps it
    movable: int  # experts from here on stay in their slots


@compiled
def _new_state(num_experts, num_ranks, width, movable):
    return SwapState(
        np.empty((num_ranks, width), np.int64),
        np.empty((num_ranks, width), np.float64),
        np.empty(num_ranks, np.float64),
        np.empty(num_experts, np.int64),
        np.empty(num_ranks, np.int64),
        movable,
    )


@compiled
def even_layers(loads, tolerance, movable, slots, peaks):
    """Even out every row of `slots` (L, G, width) under `loads` (L, E), descending; fill `peaks` (L,), tokens.

    Experts from `movable` on stay in their slots, as in `refine`.

    A layer is finished once its busiest rank is within `tolerance` of the mean or of the heaviest replica.
    """
    num_rows, num_ranks, width = slots.shape
    layer = _new_state(loads.shape[1], num_ranks, width, movable)
    for row in range(num_rows):
        _load_layer(loads[row], slots[row], layer)
        least = 0.0
        for expert in range(loads.shape[1]):
            least += loads[row, expert] / num_ranks
        for rank in range(num_ranks):
            least = max(least, layer.share[rank, 0])
        _even_out(least * (1 + tolerance), layer)
        peaks[row] = _peak_of(layer)
        _store(layer, slots[row])


@compiled
def refine(loads, goal, tries, random, movable, slots):
    """Search on from `slots` (S,), a placement of one row, until its peak is within `goal` tokens; return the peak.

    Iterated local search: change one or two replicas at random, even the ranks out, keep what is no worse. On few
    slots per rank this halves the gap of simulated annealing in a tenth of its time, because evening out is cheap.
    `random` uint64 (1,) is the state of the generator, not 0.
    """
    num_ranks, width = slots.shape
    layer = _new_state(loads.size, num_ranks, width, movable)
    kept = _new_state(loads.size, num_ranks, width, movable)
    _load_layer(loads, slots, layer)
    _even_out(goal, layer)
    peak = _peak_of(layer)
    _store(layer, slots)
    is_kept = False
    for _ in range(tries):
        if peak <= goal:
            break
        for _ in range(1 + draw(random, 2)):
            if loads.size < num_ranks * width and draw(random, 4) > 0:
                _change_count(loads, random, layer)
            else:
                _change_places(random, layer)
        _even_out(goal, layer)
        if _peak_of(layer) <= peak:
            peak = _peak_of(layer)
            _store(layer, slots)
            is_kept = False
            continue
        if not is_kept:
            _load_layer(loads, slots, kept)  # not what led to `slots`, whose sums were rounded on the way
            is_kept = True
        _copy(kept, layer)
    return peak


@compiled
def _copy(source, target):
    target.held[:] = source.held
    target.share[:] = source.share
    target.load[:] = source.load
    target.counts[:] = source.counts
    target.line[:] = source.line


@compiled_inner
def _peak_of(layer):
    """Tokens of the busiest rank, after `_even_out`."""
    return layer.load[layer.line[layer.line.size - 1]]


@compiled_inner
def _store(layer, slots):
    num_ranks, width = slots.shape
    for rank in range(num_ranks):
        for slot in range(width):
            slots[rank, slot] = layer.held[rank, slot]


@compiled_inner
def _load_layer(loads, slots, layer):
    """Fill `layer` from the experts in `slots` (G, width)."""
    num_ranks, width = slots.shape
    for expert in range(loads.size):
        layer.counts[expert] = 0
    for rank in range(num_ranks):
        for slot in range(width):
            layer.counts[slots[rank, slot]] += 1
    for rank in range(num_ranks):
        layer.load[rank] = 0.0
        layer.line[rank] = rank
        for slot in range(width):
            expert = slots[rank, slot]
            share = loads[expert] / layer.counts[expert]
            layer.load[rank] += share
            layer.share[rank, slot] = np.inf
            _put(rank, slot, expert, share, slot + 1, layer)


@compiled_inner
def _holds(rank, expert, layer):
    for slot in range(layer.held.shape[1]):  # noqa: SIM110 (any() of a generator is not for compiled code)
        if layer.held[rank, slot] == expert:
            return True
    return False


@compiled_inner
def _put(rank, slot, expert, share, width, layer):
    """Replace what `slot` _holds and keep the rank's first `width` slots in descending order of share."""
    held, shares = layer.held, layer.share
    while slot > 0 and shares[rank, slot - 1] < share:
        held[rank, slot], shares[rank, slot] = held[rank, slot - 1], shares[rank, slot - 1]
        slot -= 1
    while slot + 1 < width and shares[rank, slot + 1] > share:
        held[rank, slot], shares[rank, slot] = held[rank, slot + 1], shares[rank, slot + 1]
        slot += 1
    held[rank, slot], shares[rank, slot] = expert, share


@compiled_inner
def _even_out(goal, layer):
    """Swap replicas between the busiest rank and another, until it is within `goal` or no swap helps.

    First choice: a swap that brings the busiest rank just within `goal` and keeps the other within it, trying the
    lightest rank first; it settles one rank for good. Else the swap that leaves the lower peak of the two.
    """
    num_ranks = layer.load.size
    for size in range(1, num_ranks):
        _move_back(size, layer)
    while True:
        busiest = layer.line[num_ranks - 1]
        over = layer.load[busiest] - goal
        if over <= 0:
            return
        mine = theirs = place = -1
        for candidate in range(num_ranks - 1):
            other = layer.line[candidate]
            if goal - layer.load[other] < over:
                break
            mine, theirs = _least_step(busiest, other, over, goal - layer.load[other], layer)
            if mine >= 0:
                place = candidate
                break
        if mine < 0:
            place, mine, theirs = _lowest_peak(busiest, layer)
            if mine < 0:
                return
        _swap(busiest, mine, layer.line[place], theirs, layer)
        _move_in_line(place, layer)
        place = num_ranks - 1
        while layer.line[place] != busiest:
            place -= 1
        _move_in_line(place, layer)


@compiled_inner
def _swap(rank, slot, other, other_slot, layer):
    mine, theirs = layer.held[rank, slot], layer.held[other, other_slot]
    my_share, their_share = layer.share[rank, slot], layer.share[other, other_slot]
    width = layer.held.shape[1]
    _put(rank, slot, theirs, their_share, width, layer)
    _put(other, other_slot, mine, my_share, width, layer)
    layer.load[rank] -= my_share - their_share
    layer.load[other] += my_share - their_share


@compiled_inner
def _may_swap(rank, slot, other, other_slot, layer):
    """Whether both may move, and neither rank would hold two replicas of one expert."""
    mine, theirs = layer.held[rank, slot], layer.held[other, other_slot]
    return (
        mine < layer.movable
        and theirs < layer.movable
        and (layer.counts[mine] == 1 or not _holds(other, mine, layer))
        and (layer.counts[theirs] == 1 or not _holds(rank, theirs, layer))
    )


@compiled_inner
def _any_step(busiest, other, step, off, layer):
    """Whether some pair of slots has shares that differ by `step`, give or take less than `off`.

    Looking at all pairs without a branch takes a fifth of the time of the passes that look for the best one, whose
    branches nobody can predict; and most pairs of ranks have none. Three slots at a time, as only the end of a row
    costs anything.
    """
    share = layer.share
    last = layer.held.shape[1] - 1
    found = False
    for slot in range(0, last + 1, 3):
        first = share[busiest, slot] - step
        second = share[busiest, min(slot + 1, last)] - step
        third = share[busiest, min(slot + 2, last)] - step
        for theirs in range(last + 1):
            given = share[other, theirs]
            found |= min(abs(first - given), abs(second - given), abs(third - given)) < off
    return found


@compiled_inner
def _least_step(busiest, other, least, most, layer):
    """The pair of slots whose shares differ least, by `least` to `most` tokens; (-1, -1) if there is none."""
    width = layer.held.shape[1]
    mine = theirs = -1
    half = (most - least) / 2
    if not _any_step(busiest, other, least + half, half + layer.load[busiest] * 1e-12, layer):  # more than is rounded
        return mine, theirs
    at = 0  # both ranks descend, so one pass over each finds the nearest partner of every slot
    for slot in range(width):
        limit = layer.share[busiest, slot] - least
        while at < width and layer.share[other, at] > limit:
            at += 1
        if at == width:
            break
        step = layer.share[busiest, slot] - layer.share[other, at]
        if step <= most and _may_swap(busiest, slot, other, at, layer):
            most, mine, theirs = step, slot, at
    return mine, theirs


@compiled_inner
def _lowest_peak(busiest, layer):
    """The swap after which the busier of the two ranks is least busy: (place in line, slot, slot), or -1s."""
    num_ranks, width = layer.held.shape
    share = layer.share
    found = (-1, -1, -1)
    top = layer.load[busiest]
    peak = top * (1 - 1e-12)  # a gain of rounding size could repeat for ever
    for place in range(num_ranks - 1):
        other = layer.line[place]
        half = (top - layer.load[other]) / 2
        off = peak - (top + layer.load[other]) / 2  # a step within `off` of `half` leaves less than `peak`
        if off <= 0:
            break  # nor would one with a heavier rank
        if not _any_step(busiest, other, half, off, layer):
            continue
        at = 0
        for slot in range(width):
            limit = share[busiest, slot] - half
            while at < width and share[other, at] > limit:
                at += 1
            for theirs in range(max(at - 1, 0), min(at + 1, width)):
                miss = abs(limit - share[other, theirs])
                if miss < off and _may_swap(busiest, slot, other, theirs, layer):
                    off = miss
                    found = (place, slot, theirs)
        peak = min(peak, (top + layer.load[other]) / 2 + off)
    return found


@compiled_inner
def _move_back(place, layer):
    """Move one rank towards the lighter end of the line, to where it belongs; return its place."""
    line, load = layer.line, layer.load
    rank = line[place]
    while place > 0 and load[line[place - 1]] > load[rank]:
        line[place] = line[place - 1]
        place -= 1
    line[place] = rank
    return place


@compiled_inner
def _move_in_line(place, layer):
    """The load of one rank changed: keep the line ascending."""
    line, load = layer.line, layer.load
    place = _move_back(place, layer)
    rank = line[place]
    while place + 1 < line.size and load[line[place + 1]] < load[rank]:
        line[place] = line[place + 1]
        place += 1
    line[place] = rank


@compiled_inner
def _change_places(random, layer):
    """Swap two slots at random."""
    num_ranks, width = layer.held.shape
    rank, other = draw(random, num_ranks), draw(random, num_ranks)
    slot, other_slot = draw(random, width), draw(random, width)
    if rank != other and _may_swap(rank, slot, other, other_slot, layer):
        _swap(rank, slot, other, other_slot, layer)


@compiled_inner
def _change_count(loads, random, layer):
    """Take a replica from one expert and give its slot to another, half the time one of the busiest rank."""
    num_ranks, width = layer.held.shape
    at = draw(random, num_ranks * width)
    while layer.counts[layer.held[at // width, at % width]] == 1:
        at = (at + 1) % (num_ranks * width)
    rank, slot = at // width, at % width
    any_expert = draw(random, layer.movable)
    expert = layer.held[layer.line[num_ranks - 1], draw(random, width)] if draw(random, 2) else any_expert
    if expert < layer.movable and layer.counts[expert] < num_ranks and not _holds(rank, expert, layer):
        loser = layer.held[rank, slot]
        layer.counts[loser] -= 1
        layer.counts[expert] += 1
        share = loads[expert] / layer.counts[expert]
        layer.load[rank] += share - layer.share[rank, slot]
        _put(rank, slot, expert, share, width, layer)
        _update_share(loser, loads, layer)
        _update_share(expert, loads, layer)


@compiled_inner
def _update_share(expert, loads, layer):
    """The number of replicas of `expert` changed: bring every rank that _holds it up to date."""
    num_ranks, width = layer.held.shape
    share = loads[expert] / layer.counts[expert]
    for rank in range(num_ranks):
        for slot in range(width):
            if layer.held[rank, slot] == expert:
                layer.load[rank] += share - layer.share[rank, slot]
                _put(rank, slot, expert, share, width, layer)
                break
