"""Local search on the soft peak of several windows, one layer at a time: serial, compiled, arrays in and arrays out.

The soft peak of a window is log(Σ exp(beta × load)) / beta, summed over ranks; beta is the inverse temperature.
Smoothing is what keeps the search from fitting the windows it saw: every rank of every window has a say, where the
true peak hears one rank a window. A rank's exp(beta × load) is a product over its slots, so a swap is judged by two dot
products over the windows, and independent noise of every expert's load enters as a factor exp(beta² × variance / 2).

Moves are judged by the change of the sum over windows of (Σ / current Σ), which is never below the change of the sum of
logarithms: log(1 + x) ≤ x. So whatever is taken for an improvement is one, and every descent ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.compiled import compiled
from evenmoe.metrics import FloatArray
from evenmoe.planner.kernels.packing import draw

# What counts as an improvement, per window, relative to its sum: above the rounding of a sum over 10⁶ windows.
LEAST = 1e-9
# Random changes between two descents, and the part of them that change a replica count. Two and one in three find
# plans 0.1-0.2 % worse in the same time on 40 slots, and the same on 288.
CHANGES, PART = 3, 3


class SoftPeak(NamedTuple):
    """One layer under way. Axes: T windows, E experts, S slots, G ranks."""

    windows: FloatArray  # (T, E) load in units of the mean rank load
    noise: FloatArray  # (E,) variance of each expert's load on top of the windows
    slots: npt.NDArray[np.int64]  # (S,) experts
    counts: npt.NDArray[np.int64]  # (E,) replicas
    held: npt.NDArray[np.bool_]  # (G, E)
    factor: FloatArray  # (T, E) factor of one replica in exp(beta × load)
    more: FloatArray  # (T, E) factor with one replica more / factor
    less: FloatArray  # (T, E) factor with one replica less / factor, where there are two
    exp_load: FloatArray  # (T, G) product of the factors of a rank
    total: FloatArray  # (T,) its sum over ranks
    part: FloatArray  # (T, G) exp_load / total
    weight: FloatArray  # (G,) sum of part over windows
    enter: FloatArray  # (T, S) factor of the slot's expert
    leave: FloatArray  # (T, S) its inverse
    rest: FloatArray  # (T, S) part of the slot's rank without the slot
    stale: npt.NDArray[np.bool_]  # (G,) ranks with swaps to look for
    movable: int  # experts from here on stay in their slots


@compiled
def search(layer, beta, tries, patience, random, slots):
    """Improve `slots` (S,), no two of one expert on a rank, by descents from at most `tries` random changes.

    It ends early after `patience` tries in a row without a better plan. `layer` is a new one, `random` uint64 (1,) the
    state of the generator, not 0. The caller keeps beta × load of any rank below 600, so that no exp overflows.
    """
    layer.slots[:] = slots
    _count(slots, layer.counts)
    for expert in range(layer.counts.size):
        _set_factors(expert, beta, layer)
    _settle(layer)
    _descend(beta, layer)
    peak = _sum_of_logs(layer.total)
    slots[:] = layer.slots
    counts = layer.counts.copy()
    waited = 0
    for _ in range(tries):
        if waited == patience:
            return
        for _ in range(CHANGES):
            if draw(random, PART) == 0:
                _change_count(beta, random, layer)
            else:
                _change_places(random, layer)
        _refresh(layer)
        _descend(beta, layer)
        reached = _sum_of_logs(layer.total)
        waited += 1
        if reached < peak - LEAST * layer.total.size:
            waited = 0
            peak = reached
            slots[:] = layer.slots
            counts[:] = layer.counts
            continue
        layer.slots[:] = slots
        for expert in range(counts.size):
            if counts[expert] != layer.counts[expert]:
                layer.counts[expert] = counts[expert]
                _set_factors(expert, beta, layer)
        _settle(layer)
        layer.stale[:] = False


@compiled
def _count(slots, counts):
    counts[:] = 0
    for slot in range(slots.size):
        counts[slots[slot]] += 1


@compiled
def _set_factors(expert, beta, layer):
    """The replica count of `expert` changed. A rank's mean load, 1, is taken off, so that nothing overflows early."""
    n = layer.counts[expert]
    shift = beta * layer.held.shape[0] / layer.slots.size
    spread = 0.5 * beta * beta * layer.noise[expert]
    for t in range(layer.total.size):
        load = beta * layer.windows[t, expert]
        power = load / n + spread / (n * n)
        layer.factor[t, expert] = np.exp(power - shift)
        layer.more[t, expert] = np.exp(load / (n + 1) + spread / ((n + 1) * (n + 1)) - power)
        if n > 1:
            layer.less[t, expert] = np.exp(load / (n - 1) + spread / ((n - 1) * (n - 1)) - power)


@compiled
def _settle(layer):
    """Bring everything in step with `slots` and the factors."""
    num_ranks = layer.held.shape[0]
    width = layer.slots.size // num_ranks
    layer.held[:] = False
    for slot in range(layer.slots.size):
        layer.held[slot // width, layer.slots[slot]] = True
    layer.held[:, layer.movable :] = True  # so that no rank can take one
    for rank in range(num_ranks):
        _set_exp_load(rank, layer)
    _refresh(layer)


@compiled
def _set_exp_load(rank, layer):
    """The experts of `rank`, or their factors, changed."""
    width = layer.slots.size // layer.held.shape[0]
    for t in range(layer.total.size):
        exp_load = 1.0
        for slot in range(rank * width, rank * width + width):
            expert = layer.slots[slot]
            exp_load *= layer.factor[t, expert]
            layer.enter[t, slot] = layer.factor[t, expert]
            layer.leave[t, slot] = 1.0 / layer.factor[t, expert]
        layer.exp_load[t, rank] = exp_load


@compiled
def _refresh(layer):
    """Some `exp_load` changed: bring what depends on its sum over ranks in step."""
    num_ranks = layer.held.shape[0]
    width = layer.slots.size // num_ranks
    layer.weight[:] = 0.0
    for t in range(layer.total.size):
        total = 0.0
        for rank in range(num_ranks):
            total += layer.exp_load[t, rank]
        layer.total[t] = total
        scale = 1.0 / total
        for rank in range(num_ranks):
            part = layer.exp_load[t, rank] * scale
            layer.part[t, rank] = part
            layer.weight[rank] += part
            for slot in range(rank * width, rank * width + width):
                layer.rest[t, slot] = part * layer.leave[t, slot]


@compiled
def _descend(beta, layer):
    """Swap and _convert until neither helps. Conversions are looked for on the ranks that a swap or change touched."""
    num_ranks = layer.held.shape[0]
    width = layer.slots.size // num_ranks
    touched = np.zeros(num_ranks, np.bool_)
    while True:
        rank = 0
        while rank < num_ranks:
            if not layer.stale[rank]:
                rank += 1
                continue
            touched[rank] = True
            layer.stale[rank] = False
            slot = rank * width
            while slot < rank * width + width:
                other = _best_swap(slot, layer)
                if other < 0:
                    slot += 1
                    continue
                _swap(slot, other, layer)
                _refresh(layer)
            rank = 0
        if layer.slots.size == layer.counts.size:
            return
        slot, expert = _best_conversion(touched, layer)
        if slot < 0:
            return
        _convert(slot, expert, beta, layer)
        _refresh(layer)


@compiled
def _best_swap(slot, layer):
    """The slot to swap with, -1 if no swap helps."""
    num_slots = layer.slots.size
    num_ranks = layer.held.shape[0]
    width = num_slots // num_ranks
    rank = slot // width
    change = np.zeros(num_slots)
    for t in range(layer.total.size):
        rest, enter = layer.rest[t, slot], layer.enter[t, slot]
        for other in range(num_slots):
            change[other] += rest * layer.enter[t, other] + enter * layer.rest[t, other]
    best, least = -1, -LEAST * layer.total.size
    for other in range(num_slots):
        other_rank = other // width
        gain = change[other] - layer.weight[rank] - layer.weight[other_rank]
        if gain < least and _may_swap(slot, other, layer):
            best, least = other, gain
    return best


@compiled
def _may_swap(slot, other, layer):
    """Whether the slots are on different ranks and neither rank would hold two replicas of one expert."""
    width = layer.slots.size // layer.held.shape[0]
    rank, other_rank = slot // width, other // width
    return (
        rank != other_rank
        and not layer.held[rank, layer.slots[other]]
        and not layer.held[other_rank, layer.slots[slot]]
    )


@compiled
def _swap(slot, other, layer):
    width = layer.slots.size // layer.held.shape[0]
    rank, other_rank = slot // width, other // width
    mine, theirs = layer.slots[slot], layer.slots[other]
    layer.slots[slot], layer.slots[other] = theirs, mine
    layer.held[rank, mine], layer.held[rank, theirs] = False, True
    layer.held[other_rank, theirs], layer.held[other_rank, mine] = False, True
    for changed in (rank, other_rank):
        _set_exp_load(changed, layer)
        layer.stale[changed] = True


@compiled
def _best_conversion(ranks, layer):
    """The slot on one of `ranks` and the expert to put there, so that an expert with several replicas loses one."""
    num_ranks, num_experts = layer.held.shape
    width = layer.slots.size // num_ranks
    change, lost, gained = np.empty(num_experts), np.zeros(num_experts), np.zeros(num_experts)
    _sum_over_ranks(lost, gained, layer)
    best, chosen, least = -1, -1, -LEAST * layer.total.size
    for slot in range(layer.slots.size):
        rank, expert = slot // width, layer.slots[slot]
        if not ranks[rank] or layer.counts[expert] == 1:
            continue
        kept = lost[expert]  # its other ranks get busier, its own rank is counted below
        for t in range(layer.total.size):
            kept -= layer.part[t, rank] * layer.less[t, expert]
        for other in range(num_experts):
            change[other] = kept + gained[other]
        for t in range(layer.total.size):
            rest = layer.rest[t, slot]
            for other in range(num_experts):
                change[other] += rest * layer.factor[t, other] * layer.more[t, other]
        for other in range(num_experts):
            if change[other] < least and not layer.held[rank, other]:
                best, chosen, least = slot, other, change[other]
    return best, chosen


@compiled
def _sum_over_ranks(lost, gained, layer):
    """Fill `lost` and `gained`: the change of all ranks that hold an expert, if it had one replica less or more."""
    width = layer.slots.size // layer.held.shape[0]
    for slot in range(layer.slots.size):
        rank, expert = slot // width, layer.slots[slot]
        lost[expert] -= layer.weight[rank]
        gained[expert] -= layer.weight[rank]
    for t in range(layer.total.size):
        for slot in range(layer.slots.size):
            rank, expert = slot // width, layer.slots[slot]
            lost[expert] += layer.part[t, rank] * layer.less[t, expert]
            gained[expert] += layer.part[t, rank] * layer.more[t, expert]


@compiled
def _convert(slot, expert, beta, layer):
    """Put another replica of `expert` into `slot`, whose own expert has several."""
    num_ranks = layer.held.shape[0]
    rank = slot * num_ranks // layer.slots.size
    loser = layer.slots[slot]
    layer.slots[slot] = expert
    layer.held[rank, loser], layer.held[rank, expert] = False, True
    layer.counts[loser] -= 1
    layer.counts[expert] += 1
    _set_factors(loser, beta, layer)
    _set_factors(expert, beta, layer)
    for other in range(num_ranks):
        if other == rank or layer.held[other, loser] or layer.held[other, expert]:
            _set_exp_load(other, layer)
            layer.stale[other] = True


@compiled
def _change_places(random, layer):
    """Swap two slots at random, if they may be."""
    slot, other = draw(random, layer.slots.size), draw(random, layer.slots.size)
    if _may_swap(slot, other, layer):
        _swap(slot, other, layer)


@compiled
def _change_count(beta, random, layer):
    """Give a random slot to a random expert, if its own expert has several replicas and the rank lacks the other."""
    num_ranks, num_experts = layer.held.shape
    slot, expert = draw(random, layer.slots.size), draw(random, num_experts)
    if layer.counts[layer.slots[slot]] > 1 and not layer.held[slot * num_ranks // layer.slots.size, expert]:
        _convert(slot, expert, beta, layer)


@compiled
def _sum_of_logs(values):
    total = 0.0
    for value in values:
        total += np.log(value)
    return total
