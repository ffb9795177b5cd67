"""`Dispatched`: what one rank gets from dispatch, and hands to combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dispatched:
    """The seven outputs of MoeDistributeDispatchV2 on one rank (specification §2.3), in the operator's order.

    A is the capacity in rows (§2.4), n the rows really received (own rows first, then the TP peer's), L this rank's
    local experts (1 on a shared-expert rank), ep and tp the world sizes (tp is 0 without tensor parallelism).
    What the operator leaves unwritten is zero here.

    Attributes:
        expand_x: (A·max(tp, 1), H), dtype of x or int8 under quant_mode 2. Rows 0…n−1, ordered by local expert,
            source rank, token.
        dynamic_scales: float32 (A·max(tp, 1),). Per-row scale, entries 0…n−1, under quant_mode 2; zero otherwise.
        assist_info_for_combine: int32 (max(Bs·K, 128·A),). (source EP rank, token on the source, k) of this
            rank's own rows; k is K+e for shared expert e.
        expert_token_nums: int64 (L,). Rows per local expert, or their inclusive prefix sums when
            expert_token_nums_type is 0. With TP a single total of own and peer rows.
        ep_recv_counts: int32 (ep·L·max(tp, 1),), longer with comm_alg "hierarchy". Inclusive prefix sums over (local
            expert, source rank); the second half holds the TP peer's.
        tp_recv_counts: int32 (tp,). [own rows, peer's rows] indexed by TP rank.
        expand_scales: float32 (A,). Of dispatch with expert_scales, the weight of each own row that a MoE expert gets;
            zero otherwise.
        num_experts: M of the dispatch, for combine; 0 if it is not known. Not one of the operator's outputs.
        number: int64 (2,), which exchange of the expert-parallel group it was, and which of the TP peers' (−1 without
            them), so that all ranks combine the same dispatch; None if it is not known. Not one of the operator's
            outputs.
    """

    expand_x: torch.Tensor
    dynamic_scales: torch.Tensor
    assist_info_for_combine: torch.Tensor
    expert_token_nums: torch.Tensor
    ep_recv_counts: torch.Tensor
    tp_recv_counts: torch.Tensor
    expand_scales: torch.Tensor
    num_experts: int = 0
    number: torch.Tensor | None = None
