"""One step of many layers in one call, since a replay has a hundred thousand small ones: `layer_kernels` in a row."""

from __future__ import annotations

from evenmoe.compiled import compiled
from evenmoe.simulator.batch_kernels import share_by_row
from evenmoe.simulator.layer_kernels import (
    TOKEN,
    choose_slots,
    count_chosen,
    count_rows,
    count_rows_once,
    expect_rows_once,
    rank_work,
    share_counts,
)


@compiled
def add_ranks(counts, totals):
    """Fill `totals` int64 (L, E) with the assignments of all ranks: counts int16 or int32 (L, E, G)."""
    for layer in range(counts.shape[0]):
        for expert in range(counts.shape[1]):
            total = 0
            for rank in range(counts.shape[2]):
                total += counts[layer, expert, rank]
            totals[layer, expert] = total


@compiled
def run_counts(layer, counts, num_tokens, first, slots, rule, quotas, seed, step, near, per_slot, found):
    """Find what layers from number `layer` on do in one step, where only counts are known.

    Args:
        layer: the first one's number, by which its random numbers go.
        counts: int16 or int32 (L, E, G).
        num_tokens: of every rank.
        first: int64 (L, E + 1), slots: int64 (L, S), quotas: int64 (L, S): for `layer_kernels.share_counts`.
        rule: one of `layer_kernels`' numbers.
        seed, step: decide random numbers.
        near: ranks of a node.
        per_slot: of the type of `counts` (S, G), overwritten.
        found: tile, then tokens, busy and padded int64 (L, G), sent and received float64 (L, 2, 2, G), as in
            `StepResult`.
    """
    tile, tokens, busy, padded, sent, received = found
    num_ranks = counts.shape[2]
    for i in range(counts.shape[0]):
        if rule == TOKEN:
            share_by_row(counts[i], num_tokens, first[i], slots[i], seed, step, layer + i, per_slot)
        else:
            share_counts(counts[i], first[i], slots[i], rule, quotas[i], per_slot)
        rank_work(per_slot, num_ranks, tile, tokens[i], busy[i], padded[i])
        count_rows(per_slot, near, sent[i, 0], received[i, 0])
        if per_slot.shape[0] == num_ranks:  # a token's experts are distinct, so no two of them go to one rank
            sent[i, 1], received[i, 1] = sent[i, 0], received[i, 0]
        else:
            expect_rows_once(per_slot, num_tokens, near, sent[i, 1], received[i, 1])


@compiled
def run_routed(experts, first, slots, rule, quotas, near, chosen, per_slot, found):
    """As `run_counts` where every assignment is known: experts integers (L, G, B, K).

    `chosen` is int32 (G, B, K), overwritten.
    """
    tile, tokens, busy, padded, sent, received = found
    num_ranks = experts.shape[1]
    for i in range(experts.shape[0]):
        choose_slots(experts[i], first[i], slots[i], rule, quotas[i], chosen)
        count_chosen(chosen, per_slot)
        rank_work(per_slot, num_ranks, tile, tokens[i], busy[i], padded[i])
        count_rows(per_slot, near, sent[i, 0], received[i, 0])
        if per_slot.shape[0] == num_ranks:
            sent[i, 1], received[i, 1] = sent[i, 0], received[i, 0]
        else:
            count_rows_once(chosen, per_slot.shape[0] // num_ranks, near, sent[i, 1], received[i, 1])
