"""Rows to the ranks of their experts, one row for each token and destination rank.

Shapes: N entries sent or received, R rows sent, W ranks, L local experts of the receiver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evenmoe.ops import memory
from evenmoe.ops.routing import Routing, received_order
from evenmoe.transport.call import GroupCall, Outgoing


@dataclass(frozen=True)
class Sending:
    """What a rank sends, by destination rank.

    Attributes:
        entries: int32 (N, 3), token, k, and which of the destination's rows is the token's.
        token: int64 (R,), the token of every row. expert: as `Routing.expert`, (N,).
        routing_counts: int64 (W, L), entries per destination rank and local expert.
        outgoing: how many of both go where.
    """

    entries: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    routing_counts: torch.Tensor
    outgoing: Outgoing


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


def prepare_sending(
    routing: Routing,
    num_tokens: int,
    shape: tuple[int, ...],
    like: torch.Tensor,
    rows_differ_by_expert: bool = False,
) -> Sending:
    """Work out which rows go where.

    Args:
        num_tokens: tokens on this rank.
        shape, like: of one row as it travels, and a tensor of its dtype and device.
        rows_differ_by_expert: a token's rows for two experts of one rank differ (smooth scales), so each must travel.
    """
    per_rank = routing.counts.sum(dim=1)
    ranks = torch.arange(len(per_rank), device=per_rank.device)
    destination = torch.repeat_interleave(ranks, per_rank)
    if rows_differ_by_expert:
        row_counts, token = per_rank, routing.token
        row = torch.arange(len(destination), device=destination.device)
    else:
        key = destination * num_tokens + routing.token
        pair, row = torch.unique(key, return_inverse=True)  # sorted: by destination, then token
        row_counts = torch.bincount(pair // max(num_tokens, 1), minlength=len(per_rank))
        token = pair % max(num_tokens, 1)
    row = row - (row_counts.cumsum(0) - row_counts)[destination]
    entries = torch.stack([routing.token, routing.k, row], dim=1).int()
    outgoing = Outgoing([3 * n for n in per_rank.tolist()], row_counts.tolist(), shape, like)
    return Sending(entries, token, routing.expert, routing.counts, outgoing)


def exchange(
    call: GroupCall,
    sending: Sending,
    counts: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor | None,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> Received:
    """Send what the ranks have agreed on, and return what was sent here.

    Args:
        counts: int64 (W, L), entries that each source sends to each local expert of this rank.
        rows, index: the rows to send are rows[index], or all of them.
        allocate: N -> memory (N, …) for the rows received. None for new memory.
    """
    incoming = call.exchange(rows, index, sending.entries)
    ranks = torch.arange(len(counts), device=counts.device)
    source = torch.repeat_interleave(ranks.repeat(counts.shape[1]), counts.T.flatten())
    entries = incoming.numbers.view(-1, 3)[received_order(counts)]
    position = torch.tensor(incoming.first, device=source.device)[source] + entries[:, 2]
    received = incoming.buffer
    out = memory.empty((len(position), *received.shape[1:]), received) if allocate is None else allocate(len(position))
    received = torch.index_select(received, 0, position, out=out)
    return Received(received, source.int(), entries[:, 0], entries[:, 1], counts)
