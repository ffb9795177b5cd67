"""Local search from a placement, one layer at a time: serial, compiled, arrays in and arrays out.

Experts are positions in descending order of load, so the result cannot depend on their names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled, compiled_inner


class SwapState(NamedTuple):
    """One layer under way: who is where, and how much every rank carries."""

    held: npt.NDArray[np.int64]  # (G, width) experts of each rank, heaviest replica first
    share: npt.NDArray[np.float64]  # (G, width) tokens per replica, in step with `held`
    load: npt.NDArray[np.float64]  # (G,) tokens per rank
    counts: npt.NDArray[np.int64]  # (E,) replicas per expert
    line: npt.NDArray[np.int64]  # (G,) ranks, lightest first; `even_out` keeps it
    movable: int  # experts from here on stay in their slots


@compiled
def new_state(num_experts, num_ranks, width, movable):
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
    layer = new_state(loads.shape[1], num_ranks, width, movable)
    for row in range(num_rows):
        load_layer(loads[row], slots[row], layer)
        least = 0.0
        for expert in range(loads.shape[1]):
            least += loads[row, expert] / num_ranks
        for rank in range(num_ranks):
            least = max(least, layer.share[rank, 0])
        even_out(least * (1 + tolerance), layer)
        peaks[row] = peak_of(layer)
        store(layer, slots[row])


@compiled_inner
def peak_of(layer):
    """Tokens of the busiest rank, after `even_out`."""
    return layer.load[layer.line[layer.line.size - 1]]


@compiled_inner
def store(layer, slots):
    num_ranks, width = slots.shape
    for rank in range(num_ranks):
        for slot in range(width):
            slots[rank, slot] = layer.held[rank, slot]


@compiled_inner
def load_layer(loads, slots, layer):
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
            put(rank, slot, expert, share, slot + 1, layer)


@compiled_inner
def holds(rank, expert, layer):
    for slot in range(layer.held.shape[1]):  # noqa: SIM110 (any() of a generator is not for compiled code)
        if layer.held[rank, slot] == expert:
            return True
    return False


@compiled_inner
def put(rank, slot, expert, share, width, layer):
    """Replace what `slot` holds and keep the rank's first `width` slots in descending order of share."""
    held, shares = layer.held, layer.share
    while slot > 0 and shares[rank, slot - 1] < share:
        held[rank, slot], shares[rank, slot] = held[rank, slot - 1], shares[rank, slot - 1]
        slot -= 1
    while slot + 1 < width and shares[rank, slot + 1] > share:
        held[rank, slot], shares[rank, slot] = held[rank, slot + 1], shares[rank, slot + 1]
        slot += 1
    held[rank, slot], shares[rank, slot] = expert, share


@compiled_inner
def even_out(goal, layer):
    """Swap replicas between the busiest rank and another, until it is within `goal` or no swap helps.

    First choice: a swap that brings the busiest rank just within `goal` and keeps the other within it, trying the
    lightest rank first; it settles one rank for good. Else the swap that leaves the lower peak of the two.
    """
    num_ranks = layer.load.size
    sort_line(layer)
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
        swap(busiest, mine, layer.line[place], theirs, layer)
        _move_in_line(place, layer)
        place = num_ranks - 1
        while layer.line[place] != busiest:
            place -= 1
        _move_in_line(place, layer)


@compiled_inner
def swap(rank, slot, other, other_slot, layer):
    mine, theirs = layer.held[rank, slot], layer.held[other, other_slot]
    my_share, their_share = layer.share[rank, slot], layer.share[other, other_slot]
    width = layer.held.shape[1]
    put(rank, slot, theirs, their_share, width, layer)
    put(other, other_slot, mine, my_share, width, layer)
    layer.load[rank] -= my_share - their_share
    layer.load[other] += my_share - their_share


@compiled_inner
def may_swap(rank, slot, other, other_slot, layer):
    """Whether both may move, and neither rank would hold two replicas of one expert."""
    mine, theirs = layer.held[rank, slot], layer.held[other, other_slot]
    return (
        mine < layer.movable
        and theirs < layer.movable
        and (layer.counts[mine] == 1 or not holds(other, mine, layer))
        and (layer.counts[theirs] == 1 or not holds(rank, theirs, layer))
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
        if step <= most and may_swap(busiest, slot, other, at, layer):
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
                if miss < off and may_swap(busiest, slot, other, theirs, layer):
                    off = miss
                    found = (place, slot, theirs)
        peak = min(peak, (top + layer.load[other]) / 2 + off)
    return found


@compiled_inner
def sort_line(layer):
    """Put the ranks in `line` in ascending order of load."""
    for size in range(1, layer.line.size):
        _move_back(size, layer)


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
