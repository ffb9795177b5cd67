"""Necessary conditions for a placement within a given peak: serial, compiled. The proofs are in `bound.py`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit


class Least(NamedTuple):
    """What every placement within the peak must have at least, and the sums that the tests read off it."""

    counts: npt.NDArray[np.int64]  # (E,) replicas that each expert needs
    share: npt.NDArray[np.float64]  # (E,) tokens per replica at these counts
    parts: npt.NDArray[np.int64]  # (E,) pieces, scratch of `lightest_experts`
    replica: npt.NDArray[np.float64]  # (S,) shares of all replicas, ascending; the last entries unused
    lightest: npt.NDArray[np.float64]  # (S + 1,) sum of the n lightest replicas
    touched: npt.NDArray[np.int64]  # (S + 1,) replicas of the n experts that have most


@njit(cache=True, nogil=True)
def lower_bounds(loads, num_ranks, width, peaks):
    """Fill `peaks` (L,) with tokens that the busiest rank of no placement of the row (L, E) can undercut."""
    least = new_least(loads.shape[1], num_ranks * width)
    for row in range(loads.shape[0]):
        low = loads[row].sum() / num_ranks
        if low > 0 and width < loads.shape[1] and not may_fit(loads[row], num_ranks, width, low, least):
            high = 2 * low
            while not may_fit(loads[row], num_ranks, width, high, least):
                low, high = high, 2 * high
            while high - low > low * 1e-10:
                middle = (low + high) / 2
                if may_fit(loads[row], num_ranks, width, middle, least):
                    high = middle
                else:
                    low = middle
        peaks[row] = low


@njit(cache=True, nogil=True)
def may_be_within(loads, num_ranks, width, peak):
    """False only if no placement of `loads` (E,) keeps every rank within `peak` tokens."""
    return may_fit(loads, num_ranks, width, peak, new_least(loads.size, num_ranks * width))


@njit(cache=True, nogil=True)
def new_least(num_experts, num_slots):
    return Least(
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.float64),
        np.empty(num_experts, np.int64),
        np.empty(num_slots, np.float64),
        np.zeros(num_slots + 1, np.float64),
        np.zeros(num_slots + 1, np.int64),
    )


@njit(cache=True, nogil=True)
def may_fit(loads, num_ranks, width, peak, least):
    """As `may_be_within`, with the scratch given."""
    spare = least_counts(loads, num_ranks, width, peak, least)
    if spare < 0:
        return False
    while True:
        tabulate(num_ranks * width - spare, least)
        raised = raise_counts(loads, num_ranks, width, peak, spare, least)
        if raised == 0:
            break
        spare -= raised
        if spare < 0:
            return False
    return not crowded(num_ranks, width, peak, spare, least)


@njit(cache=True, nogil=True)
def least_counts(loads, num_ranks, width, peak, least):
    """Counts that leave room beside each replica for the lightest company it can have; return the spare replicas."""
    num_experts = loads.size
    room, spare = peak, -1
    while True:
        before, spare = spare, num_ranks * width - num_experts
        for expert in range(num_experts):
            count = max(1, int(np.ceil(loads[expert] / room * (1 - 1e-14))))
            spare -= count - 1
            if count > num_ranks or spare < 0:
                return -1
            least.counts[expert] = count
            least.share[expert] = loads[expert] / count
        if spare == before:
            return spare
        room = peak - lightest_experts(width - 1, spare, least)
        if room <= 0:
            return -1


@njit(cache=True, nogil=True)
def lightest_experts(number, spare, least):
    """The least that `number` different experts can weigh when `spare` replicas more are dealt out among them."""
    share = np.sort(least.share)[:number]
    parts = least.parts
    parts[:number] = 1
    for _ in range(spare if number > 0 else 0):
        best, gain = 0, -1.0
        for i in range(number):
            saved = share[i] / (parts[i] * (parts[i] + 1))
            if saved > gain:
                best, gain = i, saved
        parts[best] += 1
    return (share / parts[:number]).sum()


@njit(cache=True, nogil=True)
def tabulate(number, least):
    """Fill the sums for the `number` replicas of the least counts."""
    at = 0
    for expert in range(least.counts.size):
        for _ in range(least.counts[expert]):
            least.replica[at] = least.share[expert]
            at += 1
    least.replica[:number].sort()
    for i in range(number):
        least.lightest[i + 1] = least.lightest[i] + least.replica[i]
    most = np.sort(least.counts)[::-1]
    for i in range(most.size):
        least.touched[i + 1] = least.touched[i] + most[i]


@njit(cache=True, nogil=True)
def raise_counts(loads, num_ranks, width, peak, spare, least):
    """Raise the counts of experts whose replicas cannot all have company light enough; return by how much."""
    raised = 0
    for expert in range(loads.size):
        count = least.counts[expert]
        company = least.lightest[max(0, count * (width - 1) - spare)]
        if loads[expert] + company > count * peak * (1 + 1e-14):
            raised += 1 if count < num_ranks else spare + 1
            least.counts[expert] = count + 1
            least.share[expert] = loads[expert] / (count + 1)
    return raised


@njit(cache=True, nogil=True)
def crowded(num_ranks, width, peak, spare, least):
    """Whether the heaviest replicas cannot all find ranks, however the spare replicas are dealt out."""
    number = num_ranks * width - spare
    most_cuts = min(spare, least.counts.size)
    for top in range(1, min(number, num_ranks + 1 + least.touched[most_cuts]) + 1):
        fits = False
        for cuts in range(most_cuts + 1):
            left = top - least.touched[cuts]  # replicas among the top ones that no spare replica has made lighter
            if left < 1 or fits_apart(left, top, num_ranks, width, peak * (1 + 1e-14), spare, least):
                fits = True
                break
        if not fits:
            return True
    return False


@njit(cache=True, nogil=True)
def fits_apart(left, top, num_ranks, width, peak, spare, least):
    """Whether `left` of the `top` heaviest replicas can have ranks with company light enough."""
    number = num_ranks * width - spare
    lightest_top = least.replica[number - top]
    if left > 1 and width > 1 and 2 * lightest_top + least.lightest[max(0, width - 2 - spare)] <= peak:
        return True  # two may share a rank: nothing follows
    if left > num_ranks:
        return False
    weight = least.lightest[number - top + left] - least.lightest[number - top]
    company = left * (width - 1)
    if weight + least.lightest[max(0, company - spare)] > left * peak:
        return False
    if width == 2:
        place = company - spare - least.touched[min(spare, least.counts.size)]
        return place < 1 or lightest_top + least.replica[place - 1] <= peak
    return True
