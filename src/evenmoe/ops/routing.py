"""Which rows a rank sends where, and in what order the receiver lays them out (specification §2.5, §2.6).

Shapes: Bs tokens, K experts per token, N entries that this rank sends, W ranks, L experts per MoE rank. An entry is one
(token, k) that some rank computes; a shared expert's entry has k = K + its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenmoe.contract.layout import Layout


@dataclass(frozen=True)
class Routing:
    """The entries of one rank in sending order: by destination rank, then its local expert, then token.

    Attributes:
        token, k: int64 (N,).
        expert: int64 (N,), row of the smooth-scale table: shared expert e is e, physical expert m is Sn + m.
        counts: int64 (W, L), entries per destination rank and local expert (column 0 alone on a shared rank).
    """

    token: torch.Tensor
    k: torch.Tensor
    expert: torch.Tensor
    counts: torch.Tensor


def route(expert_ids: torch.Tensor, layout: Layout, x_active_mask: torch.Tensor | None) -> Routing:
    """Lay out what this rank sends.

    Args:
        expert_ids: integers (Bs, K), physical ids; ids of M and above are virtual and stay at home.
        x_active_mask: bool (Bs,), of which only the number of True counts, or (Bs, K), or None.
    """
    num_tokens, top_k = expert_ids.shape
    physical, device = layout.num_experts, expert_ids.device
    sent = sent_entries(expert_ids, layout, x_active_mask)
    # Entries that stay at home get the largest key, so that a stable sort leaves the sent ones in front, by expert and
    # then in row-major order, which is token order since the ids of a token differ.
    key = torch.where(sent, expert_ids, physical).flatten().long()
    counts_by_expert = torch.bincount(key, minlength=physical + 1)[:physical]
    order = torch.sort(key, stable=True)
    num_sent = int(counts_by_expert.sum())
    entry, expert = order.indices[:num_sent], order.values[:num_sent]
    token, k = entry // top_k, entry % top_k
    counts = torch.zeros((layout.ep, layout.experts_per_rank), dtype=torch.int64, device=device)
    counts[layout.shared_ranks :] = counts_by_expert.view(-1, layout.experts_per_rank)
    if layout.shared_ranks:
        active = active_tokens(num_tokens, x_active_mask, device).nonzero().flatten()
        shared = torch.arange(layout.shared_experts, device=device)
        hosts = shared * layout.ranks_per_shared + layout.rank % layout.ranks_per_shared
        counts[hosts, 0] = active.numel()
        shared_per_entry = shared.repeat_interleave(active.numel())
        token = torch.cat([active.repeat(layout.shared_experts), token])
        k = torch.cat([top_k + shared_per_entry, k])
        expert = torch.cat([shared_per_entry, expert + layout.shared_experts])
    return Routing(token, k, expert, counts)


def sent_entries(expert_ids: torch.Tensor, layout: Layout, x_active_mask: torch.Tensor | None) -> torch.Tensor:
    """bool (Bs, K): entries that go to a MoE rank: active, and not virtual (§2.9, §2.10)."""
    sent = expert_ids < layout.num_experts
    if x_active_mask is not None:
        sent = sent & active_entries(expert_ids, x_active_mask)
    return sent


def active_entries(expert_ids: torch.Tensor, x_active_mask: torch.Tensor) -> torch.Tensor:
    """bool (Bs, K): what the mask leaves; the first n tokens for a 1-D mask with n True values (§2.9)."""
    if x_active_mask.dim() == 2:
        return x_active_mask
    tokens = torch.arange(expert_ids.shape[0], device=expert_ids.device)
    return (tokens < x_active_mask.sum())[:, None].expand(expert_ids.shape)


def active_tokens(num_tokens: int, x_active_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool (Bs,): tokens with any active entry; they go to the shared experts and get an output row."""
    if x_active_mask is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    if x_active_mask.dim() == 2:
        return x_active_mask.any(dim=1)
    return torch.arange(num_tokens, device=device) < x_active_mask.sum()


def received_order(counts: torch.Tensor) -> torch.Tensor:
    """Positions that turn rows ordered by (source, local expert) into the order (local expert, source).

    Args:
        counts: int64 (W, L), rows from each source for each local expert.

    Returns:
        int64 (counts.sum(),), positions in the received rows.

    Rank 0 sent one row for each expert, rank 1 two rows for expert 0:

    >>> received_order(torch.tensor([[1, 1], [2, 0]])).tolist()
    [0, 2, 3, 1]
    """
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    lengths = counts.T.flatten()
    return runs(starts.T.flatten(), lengths)


def runs(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranges start…start+length−1.

    >>> runs(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()), device=starts.device)
