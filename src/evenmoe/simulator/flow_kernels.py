"""Compiled counts of rows on the wire, from the picks that each slot takes from each source rank.

Slot s is on rank s // (S / G), and rank g on node g // (G / nodes). A row from a rank to itself is not on the wire.
`sent` and `received` are (2, G): rows to or from other ranks of the node, and other nodes.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled

WITHIN, BETWEEN = range(2)


@compiled
def rank_work(per_slot, num_ranks, tokens, busy):
    """Fill, per rank, the rows that it computes, int64 (G,), and how many of its slots have any, int64 (G,)."""
    slots_per_rank = per_slot.shape[0] // num_ranks
    for rank in range(num_ranks):
        tokens[rank] = 0
        busy[rank] = 0
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            total = _total(per_slot[slot])
            tokens[rank] += total
            if total > 0:
                busy[rank] += 1


@compiled
def count_rows(per_slot, ranks_per_node, sent, received):
    """Fill float64 `sent` and `received`: one row per pick."""
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

    Every token of a source rank is taken to be as likely as any other to be among the picks of a slot, independently
    of its other picks. So it goes to a rank with probability 1 − Π (1 − picks / tokens) over that rank's slots, which
    is exact for ranks with one slot.
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
        _book(row, target, ranks_per_node, sent, received)


@compiled
def _book(row, target, ranks_per_node, sent, received):
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
