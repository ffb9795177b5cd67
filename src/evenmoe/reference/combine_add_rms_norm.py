"""MoeDistributeCombineAddRmsNorm over the whole world: combine, residual and RmsNorm in one (§4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evenmoe.dispatched import Dispatched
from evenmoe.reference.combine import Sums, accumulate
from evenmoe.reference.numerics import reciprocal_sqrt, tree_sum
from evenmoe.reference.world import one_per_rank


def combine_add_rms_norm(
    expand_x: Sequence[torch.Tensor | None],
    expert_ids: Sequence[torch.Tensor | None],
    dispatched: Sequence[Dispatched | None],
    expert_scales: Sequence[torch.Tensor | None],
    residual_x: Sequence[torch.Tensor | None],
    gamma: torch.Tensor | Sequence[torch.Tensor | None],
    *,
    norm_eps: float = 1e-6,
    **keywords: Any,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """Combine without rounding the sum, add the residual, and normalise.

    Args:
        expand_x, expert_ids, dispatched, expert_scales, keywords: those of `accumulate`; expand_x is bfloat16 on the
            chip, float16 and float32 are a convenience.
        residual_x: per rank (Bs,1,H).
        gamma: (H,), or (Bs,1,H) as the original page's demo passes it; one tensor or one per rank.
        norm_eps: added to the mean square, in fp32.

    Returns:
        Per rank (y, rstd, x): (Bs,1,H), float32 (Bs,1,1), (Bs,1,H); y and x of expand_x's dtype; rows of inactive
        tokens are zero; None on a rank that is gone.

    Source: §4. One expert, weight 1: x = (2, 2) + (1, 5); mean square 29; y = x/√29 · gamma:

    >>> from evenmoe.reference.dispatch import dispatch
    >>> token, ids, weights = [torch.tensor([[2.0, 2.0]])], [torch.tensor([[0]])], [torch.tensor([[1.0]])]
    >>> dispatched = dispatch(token, ids, num_experts=1)
    >>> [(y, rstd, x)] = combine_add_rms_norm([dispatched[0].expand_x], ids, dispatched, weights,
    ...     [torch.tensor([[[1.0, 5.0]]])], torch.tensor([1.0, 2.0]), num_experts=1, norm_eps=0.0)
    >>> x, rstd, y
    (tensor([[[3., 7.]]]), tensor([[[0.1857]]]), tensor([[[0.5571, 2.5997]]]))
    """
    n = len(expand_x)
    sums = accumulate(expand_x, expert_ids, dispatched, expert_scales, **keywords)
    rows, residuals, gammas = one_per_rank(expand_x, n), one_per_rank(residual_x, n), one_per_rank(gamma, n)
    return [
        None if total is None else _add_rms_norm(total, residuals[d], gammas[d], norm_eps, rows[d].dtype)
        for d, total in enumerate(sums)
    ]


def _add_rms_norm(
    sums: Sums, residual_x: torch.Tensor, gamma: torch.Tensor, norm_eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, hidden = sums.values.shape
    y = torch.zeros((num_tokens, 1, hidden), dtype=dtype)
    rstd = torch.zeros((num_tokens, 1, 1), dtype=torch.float32)
    x = torch.zeros((num_tokens, 1, hidden), dtype=dtype)
    share = torch.tensor(1.0 / hidden, dtype=torch.float32)
    epsilon = torch.tensor(norm_eps, dtype=torch.float32)
    for token in range(num_tokens):
        if not sums.active[token]:
            continue
        x32 = sums.values[token] + residual_x[token, 0].float()
        mean_square = tree_sum((x32 * x32) * share)
        token_rstd = reciprocal_sqrt(mean_square + epsilon)
        token_gamma = gamma if gamma.dim() == 1 else gamma[token, 0]
        normed = (x32 * token_rstd).to(dtype)  # from the unrounded x32, and rounded before gamma
        y[token, 0] = (normed.float() * token_gamma.float()).to(dtype)
        rstd[token, 0, 0] = token_rstd
        x[token, 0] = x32.to(dtype)
    return y, rstd, x
