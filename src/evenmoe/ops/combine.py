"""MoeDistributeCombineV2: bring the experts' rows home and add them up (specification §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from evenmoe.contract.combine import check_combine
from evenmoe.contract.layout import Layout, scale_down
from evenmoe.contract.limits import resolve_limits
from evenmoe.dispatched import Dispatched
from evenmoe.ops.groups import collective
from evenmoe.ops.homecoming import bring_home
from evenmoe.ops.registration import CHECKS, GROUPS, VIRTUAL, register
from evenmoe.ops.specs import specs_of
from evenmoe.ops.weighted_sum import accumulate
from evenmoe.transport.process_world import Group


def combine(
    expert_out: torch.Tensor,
    expert_ids: torch.Tensor,
    dispatched: Dispatched,
    expert_scales: torch.Tensor,
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
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    check_values: bool = True,
    limits: str | None = "relaxed",
) -> torch.Tensor:
    """Send the experts' rows back to their tokens and add them up, weighted; a collective of the whole world.

    The sum runs in float32, k ascending, each product rounded before it is added, then the shared experts, then
    `shared_expert_x`, both unweighted; one rounding to the output dtype (§3.4).

    Args:
        expert_out: float16, bfloat16 (or float32, beyond the chip) (A·max(tp, 1), H), the experts' outputs in the row
            order of `dispatched.expand_x`.
        expert_ids: int32 (Bs, K), the physical ids that dispatch was called with.
        dispatched: what dispatch returned.
        expert_scales: float32 (Bs, K), gate weights.
        num_experts: M; None for that of the dispatch.
        ep, tp, group, x_active_mask, elastic_info, expert_shard_type, shared_expert_num,
            shared_expert_rank_num, global_bs, zero_expert_num, copy_expert_num, const_expert_num: as in dispatch.
        activation_scale, weight_scale, group_list, expand_scales, performance_info: None on this chip.
        shared_expert_x: (Bs, H) or (a, b, H) with a·b = Bs, dtype of expert_out, added to the sum; only without ranks
            for shared experts.
        ori_x: (Bs, H), dtype of expert_out, the tokens themselves, for copy and const experts.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: (const_expert_num, H), dtype of expert_out. Const
            expert j gives p1·x + p2·v[j], where p = softmax(Σ alpha_1[j]·x, Σ alpha_2[j]·x).
        comm_quant_mode: 0, or 2 to send int8 with one scale per eight elements.
        out_dtype, group_list_type, comm_alg: not looked at.
        check_values: refuse ids, triples and counts that do not belong to the dispatch. False saves the passes.
        limits: as in dispatch.

    Returns:
        (Bs, H), dtype of expert_out; rows of inactive tokens are zero.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §3.6.
        RankDisagreementError: the ranks combine different dispatches or call with different sizes, or the call was
            refused or failed on another rank; the same on every rank. The next call that all ranks make is right.
        LostRankError: a rank is gone or was interrupted; `.ranks` says which. The group is closed for good.

    Two ranks, one expert each; expert 0 doubles, expert 1 negates; every token uses both, half and half:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     x = torch.tensor([[float(rank.index + 1)]])
    ...     ids = torch.tensor([[0, 1]], dtype=torch.int32)
    ...     d = em.dispatch(x, ids, ep=rank.ep, num_experts=2)
    ...     out = d.expand_x * (2.0 if rank.index == 0 else -1.0)
    ...     return em.combine(out, ids, d, torch.tensor([[0.5, 0.5]]), ep=rank.ep).item()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)
    [0.5, 1.0]
    """
    with combining("combine", locals()) as arguments:
        return torch.ops.evenmoe.combine(**arguments)


@contextmanager
def combining(name: str, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of the public functions -> those of the registered operator `name`, which is called inside."""
    arguments = dict(given)
    dispatched: Dispatched | None = arguments.pop("dispatched")
    arguments["expand_x"] = arguments.pop("expert_out")
    # What is missing here is None there, and refused like any other argument.
    arguments["assist_info_for_combine"] = getattr(dispatched, "assist_info_for_combine", None)
    arguments["ep_send_counts"] = getattr(dispatched, "ep_recv_counts", None)
    arguments["tp_send_counts"] = getattr(dispatched, "tp_recv_counts", None)
    if arguments["num_experts"] is None:
        arguments["num_experts"] = getattr(dispatched, "num_experts", None) or None
    arguments["dispatch_number"] = getattr(dispatched, "number", None)
    with collective(arguments, name, "combine", given["expert_out"]) as arguments:
        yield arguments


def layout_of(check: Callable[..., Layout], given: dict[str, Any]) -> Layout:
    """Run the contract's check on the arguments of a combine operator; the layout of the ranks that take part."""
    arguments = {
        name: value for name, value in given.items() if name not in ("check_values", "limits", "dispatch_number")
    }
    layout = check(**specs_of(arguments), limits=resolve_limits(given["limits"]))
    if given["elastic_info"] is None:
        return layout
    return scale_down(layout, given["elastic_info"].tolist())


def _run(given: dict[str, Any]) -> torch.Tensor:
    layout, rows, place = bring_home(lambda: layout_of(check_combine, given), given)
    total, active = accumulate(layout, rows, place, given)
    return torch.where(active[:, None], total, 0.0).to(given["expand_x"].dtype)


def _fake(given: dict[str, Any]) -> torch.Tensor:
    return given["expand_x"].new_empty((given["expert_ids"].shape[0], given["expand_x"].shape[1]))


# What combine and combine_add_rms_norm share, in the operators' order (§3.1).
REQUIRED = ("expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales")
OPTIONAL = (
    "tp_send_counts",
    "x_active_mask",
    "activation_scale",
    "weight_scale",
    "group_list",
    "expand_scales",
    "shared_expert_x",
    "elastic_info",
    "ori_x",
    "const_expert_alpha_1",
    "const_expert_alpha_2",
    "const_expert_v",
    "performance_info",
    "dispatch_number",  # beyond the operator's: the eighth output of dispatch
)
ATTRIBUTES = {
    **GROUPS,
    "expert_shard_type": "int",
    "shared_expert_num": "int",
    "shared_expert_rank_num": "int",
    "global_bs": "int",
    "out_dtype": "int",
    "comm_quant_mode": "int",
    "group_list_type": "int",
    "comm_alg": "str",
    **VIRTUAL,
    **CHECKS,
}

register("combine", REQUIRED, OPTIONAL, ATTRIBUTES, outputs=1, run=_run, fake=_fake)
