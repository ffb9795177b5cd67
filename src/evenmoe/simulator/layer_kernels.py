"""What is compiled of one layer of one step: slots that a rule chooses, rows that ranks compute and exchange.

A layer's replicas are two arrays: replica q of expert e is slot `slots[first[e] + q]`, in the order of its EPLB row.
Slot s is on rank s // (S / G), and rank g on node g // (G / nodes). A row from a rank to itself is not communicated.
`sent` and `received` are (2, G): rows to or from other ranks of the node, and other nodes.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled

RANK, TOKEN, OCCURRENCE, BATCH, EVEN, MODULO = range(6)  # `Rule.kernel`
WITHIN, BETWEEN = range(2)


@compiled
def choose_slots(experts, first, slots, rule, quotas, chosen):
    """Fill `chosen` int32 (G, B, K) with the slot of every assignment.

    Args:
        experts: integers (G, B, K).
        first: int64 (E + 1,), slots: int64 (S,), the replicas.
        rule: one of this module's numbers. EVEN gives the assignments of an expert in the whole batch, rank after rank
            and row after row, to its replicas in turn, the first of expert e to replica e mod count.
        quotas: int64 (S,), read by BATCH: assignments that each slot takes.
    """
    num_ranks, num_tokens, top_k = experts.shape
    num_experts = first.size - 1
    seen = np.zeros(num_experts, np.int64)  # so far: on this rank by occurrence, on all ranks by batch and even
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
                elif rule == MODULO:
                    replica = rank % count
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
    """Fill `per_slot` int16 or int32 (S, G) with the assignments that each slot takes from each source rank."""
    per_slot[:] = 0
    for rank in range(chosen.shape[0]):
        for token in range(chosen.shape[1]):
            for k in range(chosen.shape[2]):
                per_slot[chosen[rank, token, k], rank] += 1


@compiled
def share_counts(counts, first, slots, rule, quotas, per_slot):
    """Fill `per_slot` int16 or int32 (S, G) with what each slot takes from each source rank, from counts.

    As `choose_slots` would choose, one by one. Not by TOKEN, which needs to know the rows of the assignments.

    Args:
        counts: int16 or int32 (E, G), assignments of each expert on each source rank. Others as for `choose_slots`.
    """
    num_experts, num_ranks = counts.shape
    for expert in range(num_experts):
        count = first[expert + 1] - first[expert]
        replicas = slots[first[expert] : first[expert + 1]]
        tokens = counts[expert]
        if count == 1:
            per_slot[replicas[0]] = tokens
        elif rule == RANK:
            width = (num_ranks + count - 1) // count
            for replica in range(count):
                taken = per_slot[replicas[replica]]
                taken[:] = 0
                begin, end = min(replica * width, num_ranks), min((replica + 1) * width, num_ranks)
                taken[begin:end] = tokens[begin:end]
        elif rule == MODULO:
            for replica in range(count):
                taken = per_slot[replicas[replica]]
                taken[:] = 0
                taken[replica::count] = tokens[replica::count]
        elif rule == BATCH:
            _cut_at_quotas(tokens, replicas, quotas, per_slot)
        else:
            _take_turns(tokens, expert, replicas, rule == OCCURRENCE, per_slot)


@compiled
def _take_turns(tokens, expert, replicas, by_rank, per_slot):
    """Give the tokens of one expert to its replicas in turn: on every rank from (rank + expert), or once for all."""
    count = replicas.size
    num_ranks = tokens.size
    whole, rest, start = np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int32)
    inverse = 1.0 / count  # a multiplication, as division would take most of the time; half a token keeps floor exact
    following = expert % count
    for rank in range(num_ranks):
        whole[rank] = np.int64((tokens[rank] + 0.5) * inverse)
        rest[rank] = tokens[rank] - whole[rank] * count
        start[rank] = following
        following += 1 if by_rank else rest[rank]
        if following >= count:
            following -= count
    for replica in range(count):
        taken = per_slot[replicas[replica]]
        for rank in range(num_ranks):
            ahead = replica - start[rank]
            if ahead < 0:
                ahead += count
            taken[rank] = whole[rank] + (1 if ahead < rest[rank] else 0)


@compiled
def _cut_at_quotas(tokens, replicas, quotas, per_slot):
    """Cut the line of one expert's tokens, rank after rank, at the quotas; the last replica takes what is left."""
    for slot in replicas:
        per_slot[slot] = 0
    replica = 0
    left = quotas[replicas[0]]
    for rank in range(tokens.size):
        more = np.int64(tokens[rank])
        while more > 0:
            while left == 0 and replica + 1 < replicas.size:
                replica += 1
                left = quotas[replicas[replica]]
            taken = more if replica + 1 == replicas.size else min(more, left)
            per_slot[replicas[replica], rank] += taken
            more -= taken
            left -= min(taken, left)


@compiled
def rank_work(per_slot, num_ranks, tile, tokens, busy, padded):
    """Fill, per rank, int64 (G,) each: the rows that it computes, how many of its slots have any, and the rows once
    each slot's are padded to whole tiles of `tile`."""
    slots_per_rank = per_slot.shape[0] // num_ranks
    for rank in range(num_ranks):
        tokens[rank] = 0
        busy[rank] = 0
        padded[rank] = 0
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            total = _total(per_slot[slot])
            tokens[rank] += total
            if total > 0:
                busy[rank] += 1
                padded[rank] += (total + tile - 1) // tile * tile


@compiled
def count_rows(per_slot, ranks_per_node, sent, received):
    """Fill float64 `sent` and `received`: one row per assignment."""
    num_ranks = sent.shape[1]
    slots_per_rank = per_slot.shape[0] // num_ranks
    # Whole numbers until the end: eight of them fit where two of float64 would wait for each other.
    row = np.empty(num_ranks, np.int32)
    near, all_sent = np.zeros(num_ranks, np.int32), np.zeros(num_ranks, np.int32)
    for target in range(num_ranks):
        row[:] = per_slot[target * slots_per_rank]
        for slot in range(target * slots_per_rank + 1, (target + 1) * slots_per_rank):
            for rank in range(num_ranks):
                row[rank] += per_slot[slot, rank]
        begin = target // ranks_per_node * ranks_per_node
        end = begin + ranks_per_node
        row[target] = 0
        total, inside = _total(row), _total(row[begin:end])
        for rank in range(num_ranks):
            all_sent[rank] += row[rank]
        for rank in range(begin, end):
            near[rank] += row[rank]
        received[WITHIN, target] = inside
        received[BETWEEN, target] = total - inside
    for rank in range(num_ranks):
        sent[WITHIN, rank] = near[rank]
        sent[BETWEEN, rank] = all_sent[rank] - near[rank]


@compiled
def _total(values):
    total = 0
    for i in range(values.size):
        total += values[i]
    return total


@compiled
def expect_rows_once(per_slot, num_tokens, ranks_per_node, sent, received):
    """Fill the expected `sent` and `received` with one row per (token, destination rank), for counts without tokens.

    Every token of a source rank is taken to be as likely as any other to go to a slot, independently of its other
    assignments. So it goes to a rank with probability 1 − Π (1 − assignments / tokens) over that rank's slots, which is
    exact for ranks with one slot.
    """
    num_ranks = sent.shape[1]
    slots_per_rank = per_slot.shape[0] // num_ranks
    row = np.empty(num_ranks)
    sent[:] = 0.0
    received[:] = 0.0
    each = 1.0 / num_tokens
    for target in range(num_ranks):
        row[:] = 1.0
        for slot in range(target * slots_per_rank, (target + 1) * slots_per_rank):
            for rank in range(num_ranks):
                row[rank] *= 1.0 - per_slot[slot, rank] * each
        for rank in range(num_ranks):
            row[rank] = num_tokens * (1.0 - row[rank])
        _enter(row, target, ranks_per_node, sent, received)


@compiled
def _enter(row, target, ranks_per_node, sent, received):
    """Enter the rows (G,) that each rank sends to `target`."""
    begin = target // ranks_per_node * ranks_per_node
    end = begin + ranks_per_node
    for rank in range(begin):
        sent[BETWEEN, rank] += row[rank]
    for rank in range(end, row.size):
        sent[BETWEEN, rank] += row[rank]
    near = 0.0
    for rank in range(begin, end):
        if rank != target:
            sent[WITHIN, rank] += row[rank]
            near += row[rank]
    received[WITHIN, target] = near
    received[BETWEEN, target] = _sum(row[:begin]) + _sum(row[end:])


@compiled
def _sum(values):
    """In four parts: a single sum waits for every addition, and this runs for every pair of ranks."""
    whole = values.size // 4 * 4
    a = b = c = d = 0.0
    for i in range(0, whole, 4):
        a += values[i]
        b += values[i + 1]
        c += values[i + 2]
        d += values[i + 3]
    for i in range(whole, values.size):
        a += values[i]
    return (a + b) + (c + d)


@compiled
def count_rows_once(chosen, slots_per_rank, ranks_per_node, sent, received):
    """Fill float64 `sent` and `received` with one row per (token, destination rank): chosen int32 (G, B, K)."""
    num_ranks, num_tokens, top_k = chosen.shape
    last = np.full(num_ranks, -1, np.int64)  # the token that each rank got last
    sent[:] = 0.0
    received[:] = 0.0
    for rank in range(num_ranks):
        for token in range(num_tokens):
            for k in range(top_k):
                target = chosen[rank, token, k] // slots_per_rank
                if target == rank or last[target] == rank * num_tokens + token:
                    continue
                last[target] = rank * num_tokens + token
                link = WITHIN if target // ranks_per_node == rank // ranks_per_node else BETWEEN
                sent[link, rank] += 1.0
                received[link, target] += 1.0
