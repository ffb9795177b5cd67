"""Rows to the ranks of their experts, one row per (token, destination rank) on the wire.

Shapes: N entries sent or received, W ranks, L local experts of the receiver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evenmoe.ops import memory
from evenmoe.ops.routing import Routing, received_order
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
    routing: Routing,
    counts: torch.Tensor,
    num_tokens: int,
    make_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows_differ_by_expert: bool = False,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> Received:
    """Send the entries of `routing` and return those sent here.

    Args:
        counts: int64 (W, L), entries that each source sends to each local expert of this rank.
        num_tokens: tokens on this rank.
        make_rows: (token (n,), expert (n,)) -> the rows to send for them; called once, see `copy_rows`.
        rows_differ_by_expert: a token's rows for two experts of one rank differ (smooth scales), so each must travel.
        allocate: N -> memory (N, …) for the rows received. None for new memory.
    """
    per_rank, recv_per_rank = routing.counts.sum(dim=1), counts.sum(dim=1)
    ranks = torch.arange(len(per_rank), device=per_rank.device)
    destination = torch.repeat_interleave(ranks, per_rank)
    if rows_differ_by_expert:
        wire_counts, wire_token = per_rank, routing.token
        wire_row = torch.arange(len(destination), device=destination.device)
    else:
        key = destination * num_tokens + routing.token
        pair, wire_row = torch.unique(key, return_inverse=True)  # sorted: by destination, then token
        wire_counts = torch.bincount(pair // max(num_tokens, 1), minlength=len(per_rank))
        wire_token = pair % max(num_tokens, 1)
    wire_row = wire_row - (wire_counts.cumsum(0) - wire_counts)[destination]
    entries = torch.stack([routing.token, routing.k, wire_row], dim=1).int()
    entries = ep.exchange_rows(entries, per_rank.tolist(), recv_per_rank.tolist())

    # Every row that travels serves some entry, so the entries tell how many rows each source sends.
    recv_wire = torch.zeros_like(recv_per_rank)
    recv_wire.scatter_reduce_(0, torch.repeat_interleave(ranks, recv_per_rank), entries[:, 2].long() + 1, "amax")
    rows = make_rows(wire_token, routing.expert)
    rows = ep.exchange_rows(rows, wire_counts.tolist(), recv_wire.tolist(), into_scratch=True)

    source = torch.repeat_interleave(ranks.repeat(counts.shape[1]), counts.T.flatten())
    entries = entries[received_order(counts)]
    position = (recv_wire.cumsum(0) - recv_wire)[source] + entries[:, 2]
    out = memory.empty((len(position), *rows.shape[1:]), rows) if allocate is None else allocate(len(position))
    rows = torch.index_select(rows, 0, position, out=out)
    return Received(rows, source.int(), entries[:, 0], entries[:, 1], counts)


def copy_rows(ep: Transport, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """rows[index], where `ep` wants rows that it is going to send."""
    return torch.index_select(rows, 0, index, out=ep.rows_to_send((len(index), *rows.shape[1:]), rows))
