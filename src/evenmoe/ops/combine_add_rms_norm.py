"""MoeDistributeCombineAddRmsNorm: combine, add the residual, normalize (specification §4)."""

from __future__ import annotations

import torch

from evenmoe.contract.calls import AddRmsNormCall
from evenmoe.contract.combine import check_combine_call
from evenmoe.dispatched import Dispatched
from evenmoe.errors import ConstraintError
from evenmoe.ops.combine import combine_and_sum, combining, make_plan
from evenmoe.ops.gradients import needed, not_recorded
from evenmoe.ops.numerics import reciprocal_sqrt, tree_sum
from evenmoe.ops.operator import Prepared, perform, register
from evenmoe.transport.process_world import Group


def combine_add_rms_norm(
    expert_out: torch.Tensor,
    expert_ids: torch.Tensor,
    dispatched: Dispatched,
    expert_scales: torch.Tensor,
    residual_x: torch.Tensor,
    gamma: torch.Tensor,
    *,
    ep: Group | None = None,
    tp: Group | None = None,
    group: Group | None = None,
    num_experts: int | None = None,
    x_active_mask: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    group_list: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    ori_x: torch.Tensor | None = None,
    const_expert_alpha_1: torch.Tensor | None = None,
    const_expert_alpha_2: torch.Tensor | None = None,
    const_expert_v: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str | None = "",
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    check_values: bool = True,
    limits: str | None = "relaxed",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Combine without rounding, add the residual and apply RmsNorm; a collective of the whole world.

    With c the float32 sum of combine: x32 = c + residual_x, x = round(x32), rstd = 1/√(mean(x32²) + norm_eps),
    y = round(round(x32 · rstd) · gamma). The mean adds its squares in a fixed tree, so all devices agree (§4).

    Args:
        residual_x: (Bs, 1, H), dtype of expert_out.
        gamma: (H,) or (Bs, 1, H), dtype of expert_out; the published demo passes the latter, a row per token.
        norm_eps: added to the mean square, not validated.
        All others: as in combine.

    Returns:
        y: (Bs, 1, H), dtype of expert_out. rstd: float32 (Bs, 1, 1). x: (Bs, 1, H), dtype of expert_out.
        Rows of inactive tokens are zero.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §3.6 and §4.
        RankDisagreementError: the ranks combine different dispatches or call with different sizes, or the call was
            invalid or failed on another rank; the same on every rank. The next call that all ranks make is right.
        LostRankError: a rank is gone or was interrupted; `.ranks` says which. The group is closed for good.

    One rank, one expert that leaves its rows as they are; 0.5·2 + 3 = 4, whose norm is 1:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     ids = torch.tensor([[0]], dtype=torch.int32)
    ...     d = em.dispatch(torch.tensor([[2.0]]), ids, ep=rank.ep, num_experts=1)
    ...     y, rstd, x = em.combine_add_rms_norm(
    ...         d.expand_x, ids, d, torch.tensor([[0.5]]), torch.tensor([[[3.0]]]), torch.tensor([10.0]),
    ...         ep=rank.ep, norm_eps=0.0)
    ...     return y.item(), rstd.item(), x.item()
    >>> with em.local_world(ep_size=1) as world:
    ...     world.run(step)
    [(10.0, 0.25, 4.0)]
    """
    with combining(AddRmsNormCall, locals()) as call:
        if needed(expert_out, expert_scales, residual_x, gamma, getattr(dispatched, "link", None)):
            raise ConstraintError(
                "expert_out",
                "given where gradients are recorded",
                "has none in combine_add_rms_norm",
                "call under torch.no_grad(), or use combine and torch.nn.functional.rms_norm",
            )
        return perform("combine_add_rms_norm", not_recorded(call))


PREPARED = Prepared("combine_add_rms_norm", check_combine_call, make_plan)


def _run(call: AddRmsNormCall[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    total, active = combine_and_sum(call, PREPARED)
    hidden, dtype = total.shape[1], call.expand_x.dtype
    x32 = total + call.residual_x[:, 0].float()
    # Each square is scaled before the reduction, by the float32 nearest to 1/H (§4).
    mean_square = tree_sum(x32 * x32 * torch.tensor(1 / hidden, dtype=torch.float32, device=x32.device))
    rstd = reciprocal_sqrt(mean_square + call.norm_eps)
    normed = (x32 * rstd[:, None]).to(dtype)  # of the unrounded sum
    y = (normed.float() * call.gamma.reshape(-1, hidden).float()).to(dtype)
    keep = active[:, None]
    y, rstd, x = (torch.where(keep, t, 0.0) for t in (y, rstd[:, None], x32.to(dtype)))
    return y[:, None], rstd[:, None], x[:, None]


def _fake(call: AddRmsNormCall[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    x = call.residual_x
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 1, 1), dtype=torch.float32), x.new_empty(x.shape)


register("combine_add_rms_norm", AddRmsNormCall, _run, _fake)
