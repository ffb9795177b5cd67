"""A mixture of experts on one process in float64, with a bound on what bfloat16 ranks may differ from it.

Shapes: T tokens, H hidden, F inner width, K experts per token, E experts. An expert is y = down · relu(up · x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BF16 = 2.0**-8  # unit roundoff of bfloat16: 8 significant bits, round to nearest
FP32 = 2.0**-24


@dataclass(frozen=True)
class Experts:
    """Weights of all experts: up (E, F, H), down (E, H, F), bfloat16."""

    up: torch.Tensor
    down: torch.Tensor


def make_experts(num_experts: int, hidden: int, inner: int, seed: int = 0) -> Experts:
    """Normal weights, scaled so that outputs are of the size of the inputs.

    >>> make_experts(2, 8, 4).down.shape
    torch.Size([2, 8, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn((num_experts, inner, hidden), generator=generator) * hidden**-0.5
    down = torch.randn((num_experts, hidden, inner), generator=generator) * inner**-0.5
    return Experts(up.bfloat16(), down.bfloat16())


def dense_moe(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_scales: torch.Tensor, experts: Experts, shards: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_k scale_k · expert_k(x) in float64, and how far the operator chain in bfloat16 can be from it.

    Args:
        x: bfloat16 (T, H). expert_ids: integers (T, K), logical experts. expert_scales: float32 (T, K).
        shards: tensor-parallel ranks that share the inner width; each rounds its part, then the sum is rounded.

    Returns:
        float64 (T, H) sums; float64 (T, H) bounds on |chain − sum|, before the chain's last rounding.

    The bound, elementwise and as long as nothing overflows or underflows, with u = 2⁻⁸ and v = 2⁻²⁴, |·| taken of
    every factor, and n·v for a float32 sum of n exact products in any order (Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., eq. 3.5; for n·v < 0.005 the factor 1.01 absorbs the higher terms, u·n·v too):
        inner:  δh ≤ u·|h| + 1.01·H·v·|up|·|x|          (relu does not enlarge it, nor does it round)
        part:   δp ≤ |down|·δh + 1.01·F·v·|down|·(|h| + δh) + u·(|p| + |down|·δh)
        shards: δy ≤ Σ δp + (shards > 1)·u·(|y| + Σ δp)
        sum:    δ  ≤ Σ_k |scale|·δy + 2(K + 3)·v·Σ_k |scale|·(|y| + δy)
    """
    out, bound = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    size = torch.zeros(x.shape, dtype=torch.float64)
    top_k, hidden, inner = expert_ids.shape[1], x.shape[1], experts.up.shape[1]
    for expert in expert_ids.unique().tolist():
        token, k = (expert_ids == expert).nonzero(as_tuple=True)
        scale = expert_scales[token, k, None].double()
        up, down, rows = experts.up[expert].double(), experts.down[expert].double(), x[token].double()
        y, delta = torch.zeros_like(rows), torch.zeros_like(rows)
        for part in range(shards):
            mine = slice(part * inner // shards, (part + 1) * inner // shards)
            h = torch.relu(rows @ up[mine].T)
            dh = BF16 * h + 1.01 * hidden * FP32 * (rows.abs() @ up[mine].T.abs())
            p = h @ down[:, mine].T
            spread = dh @ down[:, mine].T.abs()
            summing = 1.01 * inner * FP32 * ((h + dh) @ down[:, mine].T.abs())
            y += p
            delta += spread + summing + BF16 * (p.abs() + spread)
        if shards > 1:
            delta += BF16 * (y.abs() + delta)
        out.index_add_(0, token, scale * y)
        bound.index_add_(0, token, scale.abs() * delta)
        size.index_add_(0, token, scale.abs() * (y.abs() + delta))
    return out, bound + 2 * (top_k + 3) * FP32 * size


def dense_add_rms_norm(
    total: torch.Tensor, bound: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x = total + residual and y = x / rms(x) · gamma in float64, with bounds for the chain's bfloat16 x and y.

    Args:
        total, bound: float64 (T, H), from `dense_moe`. residual: (T, H). gamma: (H,).

    Returns:
        float64 (T, H) each: x, bound on x, y, bound on y.

    With δ the bound on x before rounding and ρ = ‖δ‖/(‖x‖ − ‖δ‖) per token, the reciprocal root changes by at most the
    factor 1 + ρ (triangle inequality of the norm), so x·rstd changes by rstd·(δ·(1 + ρ) + |x|·ρ); then two roundings
    to bfloat16, and float32 noise far below u, absorbed by the factor 1.01.
    """
    x = total + residual.double()
    delta = bound + 4 * FP32 * (x.abs() + bound)
    rstd = (x.square().mean(dim=1, keepdim=True) + norm_eps).rsqrt()
    norm = delta.norm(dim=1, keepdim=True)
    rho = norm / (x.norm(dim=1, keepdim=True) - norm).clamp(min=torch.finfo(torch.float64).tiny)
    normed, gamma = x * rstd, gamma.double()
    moved = rstd * (delta * (1 + rho) + x.abs() * rho)
    y_bound = gamma.abs() * (moved + 1.01 * 2 * BF16 * (normed.abs() + moved))
    return x, delta + BF16 * (x.abs() + delta), normed * gamma, y_bound
