"""Rows to the ranks of their experts, one row per (token, destination rank) on the wire.

Shapes: N entries sent or received, W ranks, L local experts of the receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from evenmoe.ops.routing import Routing, received_order
from evenmoe.transport.agreement import exchange_counts
from evenmoe.transport.contract import Transport


@dataclass(frozen=True)
class Received:
    """What a rank holds after the exchange, ordered by local expert, source rank, token (§2.5).

    Attributes:
        rows: (N, …), as sent.
        source, token, k: int32 (N,), where each row came from.
        counts: int64 (W, L), rows per source and local expert.
    """

    rows: torch.Tensor
    source: torch.Tensor
    token: torch.Tensor
    k: torch.Tensor
    counts: torch.Tensor


def exchange(
    ep: Transport,
    operator: str,
    sizes: Mapping[str, int],
    routing: Routing,
    local_experts: int,
    num_tokens: int,
    make_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows_differ_by_expert: bool,
) -> Received:
    """Send the entries of `routing` and return those sent here.

    Args:
        operator, sizes: what all ranks must agree on.
        local_experts: experts on this rank.
        num_tokens: tokens on this rank.
        make_rows: (token (n,), expert (n,)) -> the rows to send for them; called once.
        rows_differ_by_expert: a token's rows for two experts of one rank differ (smooth scales), so each must travel.
    """
    per_rank = routing.counts.sum(dim=1)
    destination = torch.repeat_interleave(torch.arange(len(per_rank), device=per_rank.device), per_rank)
    if rows_differ_by_expert:
        wire_counts, wire_token, wire_expert = per_rank, routing.token, routing.expert
        wire_row = torch.arange(len(destination), device=destination.device)
    else:
        key = destination * num_tokens + routing.token
        pair, wire_row = torch.unique(key, return_inverse=True)  # sorted: by destination, then token
        wire_counts = torch.bincount(pair // max(num_tokens, 1), minlength=len(per_rank))
        wire_token, wire_expert = pair % max(num_tokens, 1), routing.expert
    wire_row = wire_row - (wire_counts.cumsum(0) - wire_counts)[destination]

    received = exchange_counts(ep, operator, sizes, torch.cat([wire_counts[:, None], routing.counts], dim=1))
    received_wire, counts = received[:, 0], received[:, 1 : 1 + local_experts]
    recv_per_rank = counts.sum(dim=1)
    entries = torch.stack([routing.token, routing.k, wire_row], dim=1).int()
    entries = ep.exchange_rows(entries, per_rank.tolist(), recv_per_rank.tolist())
    rows = ep.exchange_rows(make_rows(wire_token, wire_expert), wire_counts.tolist(), received_wire.tolist())

    order = received_order(counts)
    ranks = torch.arange(len(per_rank), device=order.device)
    source = torch.repeat_interleave(ranks.repeat(local_experts), counts.T.flatten())
    entries = entries[order]
    position = (received_wire.cumsum(0) - received_wire)[source] + entries[:, 2]
    return Received(rows.index_select(0, position), source.int(), entries[:, 0], entries[:, 1], counts)
