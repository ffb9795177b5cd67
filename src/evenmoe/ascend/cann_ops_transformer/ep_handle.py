"""`EPHandle`: what ElasticBuffer's dispatch leaves for combine and for the next dispatch (specification §16)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenmoe.transport.agreement import UNKNOWN

Tensor = torch.Tensor


@dataclass
class EPHandle:
    """What dispatch found out: combine needs it, and a later dispatch of the same routing can use it again.

    Attributes:
        dst_buffer_slot_idx: int32 (Bs, K), the slot of every entry on the rank of its expert; −1 where nothing is sent.
        recv_src_metadata: int32 (A, 4), of every row (source rank, token there, k, slot).
        num_recv_tokens_per_rank: int32 (W,), tokens received from each rank.
        num_recv_tokens_per_expert: int64 (L,), rows of each local expert.
        num_experts, expert_alignment, num_max_tokens_per_rank: int, those of the dispatch.
        topk_idx: int32 (Bs, K), those of the dispatch.
        number: int, which exchange of the group the dispatch was, so that all ranks combine the same; −1 for any.
            Upstream's has none.
    """

    dst_buffer_slot_idx: Tensor
    recv_src_metadata: Tensor
    num_recv_tokens_per_rank: Tensor
    num_recv_tokens_per_expert: Tensor
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    topk_idx: Tensor
    number: int = UNKNOWN

    @property
    def num_recv_tokens(self) -> int:
        """Tokens received, each counted once however many of its experts are here."""
        return int(self.num_recv_tokens_per_rank.sum().item())
