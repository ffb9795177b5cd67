"""MoeDistributeCombineV2 over the whole world: expert outputs back to their tokens, weighted and summed (§3).

And MoeDistributeCombineAddRmsNorm: combine, residual and RmsNorm in one (§4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenmoe.dispatched import Dispatched
from evenmoe.reference.numerics import reciprocal_sqrt, softmax_of_two, through_int8_transport, tp_sum, tree_sum
from evenmoe.reference.world import World, active_entries, make_world, one_per_rank


def combine(
    expand_x: Sequence[torch.Tensor | None],
    expert_ids: Sequence[torch.Tensor | None],
    dispatched: Sequence[Dispatched | None],
    expert_scales: Sequence[torch.Tensor | None],
    **keywords: Any,
) -> list[torch.Tensor | None]:
    """Send every expert's output back to its token and sum the K of them, weighted.

    Args:
        expand_x, expert_ids, dispatched, expert_scales, keywords: those of `accumulate`.

    Returns:
        Per rank (Bs,H), dtype of expand_x, rounded once to nearest even; rows of inactive tokens are zero; None on a
        rank that is gone.

    Source: §3. One rank, one token, two experts that double and triple it: 0.5·2x + 0.25·3x:

    >>> from evenmoe.reference.dispatch import dispatch
    >>> ids = [torch.tensor([[0, 1]])]
    >>> dispatched = dispatch([torch.tensor([[4.0, 8.0]])], ids, num_experts=2)
    >>> outputs = [dispatched[0].expand_x * torch.tensor([[2.0], [3.0]])]
    >>> combine(outputs, ids, dispatched, [torch.tensor([[0.5, 0.25]])], num_experts=2)
    [tensor([[ 7., 14.]])]
    """
    sums = accumulate(expand_x, expert_ids, dispatched, expert_scales, **keywords)
    results: list[torch.Tensor | None] = []
    for rows, total in zip(expand_x, sums, strict=True):
        results.append(None if rows is None or total is None else total.values.to(rows.dtype))
    return results


@dataclass(frozen=True)
class Sums:
    """The fp32 sums of one rank before they are rounded.

    Attributes:
        values: float32 (Bs,H), zero for inactive tokens.
        active: Bs flags, which tokens take part.
    """

    values: torch.Tensor
    active: list[bool]


def accumulate(
    expand_x: Sequence[torch.Tensor | None],
    expert_ids: Sequence[torch.Tensor | None],
    dispatched: Sequence[Dispatched | None],
    expert_scales: Sequence[torch.Tensor | None],
    *,
    num_experts: int,
    tp_world_size: int = 0,
    x_active_mask: Sequence[torch.Tensor | None] | None = None,
    shared_expert_x: Sequence[torch.Tensor | None] | None = None,
    elastic_info: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ori_x: Sequence[torch.Tensor | None] | None = None,
    const_expert_alpha_1: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    const_expert_alpha_2: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    const_expert_v: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> list[Sums | None]:
    """The part that combine and combine_add_rms_norm share: everything up to the fp32 sum of §3.4.

    Args:
        expand_x: per rank (≥ rows, H) bfloat16, float16 or float32, the experts' outputs in dispatch's row order.
        expert_ids: per rank int (Bs,K), as given to dispatch.
        dispatched: dispatch's results; the assist_info and counts are read from them.
        expert_scales: per rank float32 (Bs,K) gate weights.
        num_experts, tp_world_size, x_active_mask, elastic_info, shared_expert_num, shared_expert_rank_num,
            zero_expert_num, copy_expert_num, const_expert_num: as given to dispatch.
        shared_expert_x: per rank (Bs,H) or (a,b,H) with a·b = Bs, added unweighted, or None.
        ori_x: per rank (Bs,H), what copy and const experts read.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: (const_expert_num,H), one tensor or one per rank.
            The first two may both be (const_expert_num,), as in November 2025: plain factors, without a softmax.
        global_bs: accepted as dispatch's, it fixes only buffer sizes and has no effect here.
        comm_quant_mode: 0, or 2: rows cross EP as int8 (§3.5; not with TP).

    Returns:
        Per rank its `Sums`; None on a rank that is gone.
    """
    n = len(expand_x)
    world = make_world(
        n,
        tp_world_size=tp_world_size,
        num_experts=num_experts,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        elastic_info=elastic_info,
    )
    received = _send_back(world, one_per_rank(expand_x, n), one_per_rank(dispatched, n), comm_quant_mode)
    ids, weights = one_per_rank(expert_ids, n), one_per_rank(expert_scales, n)
    masks, shared_x, original_x = (one_per_rank(value, n) for value in (x_active_mask, shared_expert_x, ori_x))
    alphas_1, alphas_2, vectors = (
        one_per_rank(value, n) for value in (const_expert_alpha_1, const_expert_alpha_2, const_expert_v)
    )
    sums: list[Sums | None] = [None] * n
    for rank, tp_rank in world.ranks():
        d = world.index(rank, tp_rank)
        virtual = _Virtual(
            first=world.current.experts,
            num_zero=zero_expert_num,
            num_copy=copy_expert_num,
            num_const=const_expert_num,
            x=original_x[d],
            alpha_1=alphas_1[d],
            alpha_2=alphas_2[d],
            v=vectors[d],
        )
        hidden = _present(expand_x[d]).shape[1]
        shared = None if shared_x[d] is None else shared_x[d].reshape(-1, hidden)
        active = active_entries(masks[d], *ids[d].shape)
        values = torch.zeros((len(ids[d]), hidden), dtype=torch.float32)
        for token in range(len(ids[d])):
            if any(active[token]):
                values[token] = _sum_of_token(
                    values[token],
                    ids[d][token],
                    weights[d][token],
                    active[token],
                    token,
                    received[d],
                    virtual,
                    world.current.shared_experts,
                    shared,
                )
        sums[d] = Sums(values, [any(entries) for entries in active])
    return sums


_Inbox = dict[tuple[int, int], torch.Tensor]  # (token, k) -> the row that came back for it


def _send_back(
    world: World, expand_x: list[torch.Tensor], dispatched: list[Dispatched], comm_quant_mode: int
) -> list[_Inbox]:
    """Every row goes to the rank, token and k of its triple; TP peers add their copies first (§3.3)."""
    inboxes: list[_Inbox] = [{} for _ in expand_x]
    for rank, tp_rank in world.ranks():
        d = world.index(rank, tp_rank)
        assist_info = dispatched[d].assist_info_for_combine.tolist()
        for i in range(_num_own(world, rank, dispatched[d])):
            source, token, k = assist_info[3 * i : 3 * i + 3]
            row = expand_x[d][i]
            if world.tp == 2:
                peer = world.index(rank, 1 - tp_rank)
                # the peer stores its own rows first, so its copy of my row i stands i places behind them
                row = tp_sum(row, expand_x[peer][_num_own(world, rank, dispatched[peer]) + i])
            if comm_quant_mode == 2:
                row = through_int8_transport(row)
            inbox = inboxes[world.index(source, tp_rank)]
            assert (token, k) not in inbox
            inbox[token, k] = row
    return inboxes


def _num_own(world: World, rank: int, dispatched: Dispatched) -> int:
    """Rows that came over EP: the last element of the rank's own prefix sums (§3.3)."""
    return int(dispatched.ep_recv_counts[world.current.ep * world.current.num_local(rank) - 1])


@dataclass(frozen=True)
class _Virtual:
    """Experts that no rank hosts, computed where the token lives (§2.10): ids from `first` on, zero, copy, const."""

    first: int
    num_zero: int
    num_copy: int
    num_const: int
    x: torch.Tensor | None
    alpha_1: torch.Tensor | None
    alpha_2: torch.Tensor | None
    v: torch.Tensor | None

    def output(self, expert: int, token: int) -> torch.Tensor | None:
        """fp32 (H,) output of a virtual expert; None for a zero expert, which adds nothing."""
        first_copy = self.first + self.num_zero
        first_const = first_copy + self.num_copy
        assert self.first <= expert < first_const + self.num_const
        if expert < first_copy:
            return None
        x = _present(self.x)[token].float()
        if expert < first_const:
            return x
        j = expert - first_const
        p1, p2 = _present(self.alpha_1)[j].float(), _present(self.alpha_2)[j].float()
        if p1.dim() == 1:
            p1, p2 = softmax_of_two(tree_sum(p1 * x), tree_sum(p2 * x))
        return p1 * x + p2 * _present(self.v)[j].float()


def _sum_of_token(
    total: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    active: list[bool],
    token: int,
    inbox: _Inbox,
    virtual: _Virtual,
    num_shared: int,
    shared_x: torch.Tensor | None,
) -> torch.Tensor:
    """The fp32 sum of one active token, from `total` = 0: k ascending, shared experts, shared_expert_x (§3.4)."""
    top_k = len(expert_ids)
    for k in range(top_k):
        if not active[k]:
            continue
        expert = int(expert_ids[k])
        output = inbox[token, k].float() if expert < virtual.first else virtual.output(expert, token)
        if output is not None:
            total = total + weights[k].float() * output
    for e in range(num_shared):
        total = total + inbox[token, top_k + e].float()
    if shared_x is not None:
        total = total + shared_x[token].float()
    return total


def _present(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value


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
    """Combine without rounding the sum, add the residual, and normalize.

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
