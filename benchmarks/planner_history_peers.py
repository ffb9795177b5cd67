"""Planners from windows to compare with: FlashLB in short, and a local search on the past windows' own peaks."""

from __future__ import annotations

import numpy as np
from numba import njit

import evenmoe as em
from planner_loads import Load

GROUPS, REACH, RISKS = 4, 8, (0.5, 1.0, 2.0)
MOVES = 40_000  # a layer


def flash(past: Load, num_ranks: int, num_slots: int) -> em.Placement:
    """FlashLB: experts in four groups by risk = mean + z × std, up to eight replicas more or less for each group, every
    count packed heaviest first by the mean + z × std of whole ranks, and the best mean PAR over the past kept."""
    slots = np.empty((past.shape[1], num_slots), np.int64)
    for layer in range(past.shape[1]):
        windows = np.ascontiguousarray(past[:, layer] * num_ranks / np.maximum(past[:, layer].sum(axis=1), 1)[:, None])
        best = np.inf
        for z in RISKS:
            risk = windows.mean(axis=0) + z * windows.std(axis=0)
            group = np.empty(risk.size, np.int64)
            group[np.argsort(-risk)] = np.arange(risk.size) * GROUPS // risk.size
            peak, plan = search_budgets(windows, risk, group, z, num_ranks, num_slots)
            if peak < best:
                best, slots[layer] = peak, plan
    return em.Placement(slots, num_ranks, num_experts=past.shape[2])


@njit(nogil=True)
def search_budgets(windows, risk, group, z, num_ranks, num_slots):
    covariance = np.cov(windows.T)
    usual = replicate(risk, num_ranks, num_slots)
    plan = pack(windows, covariance, usual, risk, z, num_ranks, num_slots)
    best = mean_peak(windows, plan, num_ranks)
    for giver in range(GROUPS):
        for taker in range(GROUPS):
            for step in range(1, REACH + 1):
                if giver == taker:
                    continue
                counts = usual.copy()
                if not shift(counts, risk, group, giver, taker, step, num_ranks):
                    break
                trial = pack(windows, covariance, counts, risk, z, num_ranks, num_slots)
                peak = mean_peak(windows, trial, num_ranks)
                if peak < best:
                    best, plan = peak, trial
    return best, plan


@njit(nogil=True)
def replicate(risk, num_ranks, num_slots):
    counts = np.ones(risk.size, np.int64)
    for _ in range(num_slots - risk.size):
        best = -1
        for expert in range(risk.size):
            if counts[expert] < num_ranks and (best < 0 or risk[expert] / counts[expert] > risk[best] / counts[best]):
                best = expert
        counts[best] += 1
    return counts


@njit(nogil=True)
def shift(counts, risk, group, giver, taker, step, num_ranks):
    """Move `step` replicas from one group to another, from its coolest replicas to the other's hottest."""
    for _ in range(step):
        cool, hot = -1, -1
        for expert in range(risk.size):
            share = risk[expert] / counts[expert]
            if group[expert] == giver and counts[expert] > 1 and (cool < 0 or share < risk[cool] / counts[cool]):
                cool = expert
            if group[expert] == taker and counts[expert] < num_ranks and (hot < 0 or share > risk[hot] / counts[hot]):
                hot = expert
        if cool < 0 or hot < 0:
            return False
        counts[cool] -= 1
        counts[hot] += 1
    return True


@njit(nogil=True)
def pack(windows, covariance, counts, risk, z, num_ranks, num_slots):
    """Heaviest replica first, to the rank whose mean + z × std stays lowest; experts on a rank are distinct."""
    width = num_slots // num_ranks
    slots = np.empty(num_slots, np.int64)
    used = np.zeros(num_ranks, np.int64)
    mean, variance = np.zeros(num_ranks), np.zeros(num_ranks)
    linked = np.zeros((num_ranks, risk.size))
    average = np.array([windows[:, expert].mean() for expert in range(risk.size)])
    for expert in np.argsort(-risk / counts):
        n = counts[expert]
        for _ in range(n):
            best, least = -1, np.inf
            for rank in range(num_ranks):
                if used[rank] == width:
                    continue
                spread = variance[rank] + 2 * linked[rank, expert] / n + covariance[expert, expert] / (n * n)
                value = mean[rank] + average[expert] / n + z * np.sqrt(max(spread, 0.0))
                for slot in range(rank * width, rank * width + used[rank]):
                    if slots[slot] == expert:
                        value += 1e6
                if value < least:
                    best, least = rank, value
            slots[best * width + used[best]] = expert
            used[best] += 1
            mean[best] += average[expert] / n
            variance[best] += 2 * linked[best, expert] / n + covariance[expert, expert] / (n * n)
            linked[best] += covariance[expert] / n
    return slots


@njit(nogil=True)
def mean_peak(windows, slots, num_ranks):
    counts = np.zeros(windows.shape[1])
    for expert in slots:
        counts[expert] += 1
    width = slots.size // num_ranks
    total = 0.0
    for t in range(len(windows)):
        peak = 0.0
        for rank in range(num_ranks):
            load = 0.0
            for slot in range(rank * width, rank * width + width):
                load += windows[t, slots[slot]] / counts[slots[slot]]
            peak = max(peak, load)
        total += peak
    return total / len(windows)


def unsmoothed(past: Load, num_ranks: int, num_slots: int) -> em.Placement:
    """A local search on the mean PAR of the past: random swaps and conversions, kept unless they are worse."""
    start = flash(past, num_ranks, num_slots).slot_to_expert.astype(np.int64)
    for layer in range(past.shape[1]):
        windows = past[:, layer] * num_ranks / np.maximum(past[:, layer].sum(axis=1), 1)[:, None]
        random = np.random.default_rng(layer)
        pairs, kinds = random.integers(0, num_slots, (MOVES, 2)), random.random(MOVES)
        climb(np.ascontiguousarray(windows.T), start[layer], num_ranks, pairs, kinds)
    return em.Placement(start, num_ranks, num_experts=past.shape[2])


@njit(nogil=True)
def climb(windows, slots, num_ranks, pairs, kinds):
    width = slots.size // num_ranks
    counts, held = np.zeros(len(windows)), np.zeros((num_ranks, len(windows)), np.bool_)
    for slot in range(slots.size):
        counts[slots[slot]] += 1
        held[slot // width, slots[slot]] = True
    loads = np.zeros((num_ranks, windows.shape[1]))
    for slot in range(slots.size):
        loads[slot // width] += windows[slots[slot]] / counts[slots[slot]]
    peak = mean_of_peaks(loads)
    for move in range(len(pairs)):
        slot, other = pairs[move]
        rank, other_rank = slot // width, other // width
        mine, theirs = slots[slot], slots[other]
        if held[rank, theirs]:
            continue
        before = loads.copy()
        copied = kinds[move] < 0.3
        if copied and counts[mine] > 1:
            # A replica of the other slot's expert takes the place of one that has more.
            for host in range(num_ranks):
                if held[host, mine]:
                    loads[host] += windows[mine] * (1 / (counts[mine] - 1) * (host != rank) - 1 / counts[mine])
                if held[host, theirs]:
                    loads[host] += windows[theirs] * (1 / (counts[theirs] + 1) - 1 / counts[theirs])
            loads[rank] += windows[theirs] / (counts[theirs] + 1)
        elif not copied and not held[other_rank, mine]:
            move = windows[theirs] / counts[theirs] - windows[mine] / counts[mine]
            loads[rank] += move
            loads[other_rank] -= move
        else:
            continue
        reached = mean_of_peaks(loads)
        if reached > peak:
            loads[:] = before
            continue
        peak = reached
        slots[slot] = theirs
        held[rank, mine], held[rank, theirs] = False, True
        if copied:
            counts[mine] -= 1
            counts[theirs] += 1
        else:
            slots[other] = mine
            held[other_rank, theirs], held[other_rank, mine] = False, True


@njit(nogil=True)
def mean_of_peaks(loads):
    total = 0.0
    for t in range(loads.shape[1]):
        peak = 0.0
        for rank in range(loads.shape[0]):
            peak = max(peak, loads[rank, t])
        total += peak
    return total / loads.shape[1]
