"""Compiled replica rules: from picks, or from counts of picks, to the slots that take them.

A layer's replicas are two arrays: replica q of expert e is slot `slots[first[e] + q]`, in the order of its EPLB row.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled

RANK, TOKEN, OCCURRENCE, BATCH, EVEN = range(5)


@compiled
def count_picks(experts, counts):
    """Add picks to `counts` int16 or int32 (E, G): experts integers (G, B, K)."""
    num_ranks, num_tokens, top_k = experts.shape
    counts[:] = 0
    for rank in range(num_ranks):
        for token in range(num_tokens):
            for k in range(top_k):
                counts[experts[rank, token, k], rank] += 1


@compiled
def choose_slots(experts, first, slots, rule, quotas, chosen):
    """Fill `chosen` int32 (G, B, K) with the slot of every pick.

    Args:
        experts: integers (G, B, K).
        first: int64 (E + 1,), slots: int64 (S,), the replicas.
        rule: one of this module's numbers. EVEN deals the picks of an expert in the whole batch, rank after rank and
            row after row, to its replicas in turn, the first of expert e to replica e mod count.
        quotas: int64 (S,), read by BATCH: picks that each slot takes.
    """
    num_ranks, num_tokens, top_k = experts.shape
    num_experts = first.size - 1
    seen = np.zeros(num_experts, np.int64)  # picks so far: on this rank by occurrence, of all ranks by batch and even
    at = np.zeros(num_experts, np.int64)  # by batch: the replica in use, and where its quota ends
    end = np.zeros(num_experts, np.int64)
    for expert in range(num_experts):
        end[expert] = quotas[slots[first[expert]]]
    for rank in range(num_ranks):
        if rule == OCCURRENCE:
            seen[:] = 0
        for token in range(num_tokens):
            for k in range(top_k):
                expert = np.int64(experts[rank, token, k])
                count = first[expert + 1] - first[expert]
                if rule == RANK:
                    replica = rank // ((num_ranks + count - 1) // count)
                elif rule == TOKEN:
                    replica = token % count
                elif rule == OCCURRENCE:
                    replica = (seen[expert] + rank + expert) % count
                elif rule == EVEN:
                    replica = (seen[expert] + expert) % count
                else:
                    while seen[expert] >= end[expert] and at[expert] + 1 < count:
                        at[expert] += 1
                        end[expert] += quotas[slots[first[expert] + at[expert]]]
                    replica = at[expert]
                seen[expert] += 1
                chosen[rank, token, k] = slots[first[expert] + replica]


@compiled
def count_chosen(chosen, per_slot):
    """Fill `per_slot` int16 or int32 (S, G) with the picks that each slot takes from each source rank."""
    per_slot[:] = 0
    for rank in range(chosen.shape[0]):
        for token in range(chosen.shape[1]):
            for k in range(chosen.shape[2]):
                per_slot[chosen[rank, token, k], rank] += 1


@compiled
def share_counts(counts, first, slots, rule, quotas, per_slot):
    """Fill `per_slot` int16 or int32 (S, G) with the picks that each slot takes from each source rank, from counts.

    As `choose_slots` would choose, pick by pick. Not by TOKEN, which needs to know the rows of the picks.

    Args:
        counts: int16 or int32 (E, G), picks of each expert on each source rank. Other arguments as for `choose_slots`.
    """
    num_experts, num_ranks = counts.shape
    for expert in range(num_experts):
        count = first[expert + 1] - first[expert]
        replicas = slots[first[expert] : first[expert + 1]]
        picks = counts[expert]
        if count == 1:
            per_slot[replicas[0]] = picks
        elif rule == RANK:
            width = (num_ranks + count - 1) // count
            for replica in range(count):
                served = per_slot[replicas[replica]]
                served[:] = 0
                begin, end = min(replica * width, num_ranks), min((replica + 1) * width, num_ranks)
                served[begin:end] = picks[begin:end]
        elif rule == BATCH:
            _cut(picks, replicas, quotas, per_slot)
        else:
            _deal(picks, expert, replicas, rule == OCCURRENCE, per_slot)


@compiled
def _deal(picks, expert, replicas, by_rank, per_slot):
    """Deal the picks of one expert in turn: on every rank anew from replica (rank + expert), or once for all."""
    count = replicas.size
    num_ranks = picks.size
    whole, rest, start = np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int32)
    inverse = 1.0 / count  # a multiplication, as division would take most of the time; half a pick keeps floor exact
    following = expert % count
    for rank in range(num_ranks):
        whole[rank] = np.int64((picks[rank] + 0.5) * inverse)
        rest[rank] = picks[rank] - whole[rank] * count
        start[rank] = following
        following += 1 if by_rank else rest[rank]
        if following >= count:
            following -= count
    for replica in range(count):
        served = per_slot[replicas[replica]]
        for rank in range(num_ranks):
            ahead = replica - start[rank]
            if ahead < 0:
                ahead += count
            served[rank] = whole[rank] + (1 if ahead < rest[rank] else 0)


@compiled
def _cut(picks, replicas, quotas, per_slot):
    """Cut the line of one expert's picks, rank after rank, at the quotas; the last replica takes what is left."""
    for slot in replicas:
        per_slot[slot] = 0
    replica = 0
    left = quotas[replicas[0]]
    for rank in range(picks.size):
        more = np.int64(picks[rank])
        while more > 0:
            while left == 0 and replica + 1 < replicas.size:
                replica += 1
                left = quotas[replicas[replica]]
            taken = more if replica + 1 == replicas.size else min(more, left)
            per_slot[replicas[replica], rank] += taken
            more -= taken
            left -= min(taken, left)
