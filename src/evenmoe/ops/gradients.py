"""The backward of dispatch and combine: each is made of the other operator, called with the same arguments.

The gradient of x is a combine of the rows' gradients with weights of 1. That of combine is a dispatch of the gradient
of its result, beside one of the weights, which the gradients are multiplied with; the dot products that are the
gradients of the weights return by a combine whose rows are as wide as a token has experts.

A rank's tensors that require gradients are how it tells the registered operator, which tells the other ranks.

Shapes: Bs tokens, H hidden, K experts per token, A capacity in rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from evenmoe.contract.calls import CombineCall, DispatchCall
from evenmoe.dispatched import Dispatched
from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import active_tokens
from evenmoe.ops.numerics import tree_sum
from evenmoe.ops.operator import Combining, collective, perform
from evenmoe.ops.weighted_sum import chunks
from evenmoe.transport.process_world import transport_of
from evenmoe.transport.transport import Transport
from evenmoe.transport.world import LocalTransport

_Call = TypeVar("_Call", DispatchCall[torch.Tensor], CombineCall[torch.Tensor])

#: The arguments that the backward calls the other operator with, as it was called itself.
_SAME = (
    *("ep", "tp", "group", "x_active_mask", "expert_shard_type", "shared_expert_num", "shared_expert_rank_num"),
    *("global_bs", "check_values", "num_experts", "zero_expert_num"),
)


def needed(*tensors: object) -> bool:
    """Whether a graph is recorded that one of these is part of."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def check_once() -> None:
    """Raise in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise ConstraintError(
            "create_graph",
            True,
            "must be False, since gradients of gradients do not cross ranks",
            "call backward without it, or keep the layer out of what is differentiated twice",
        )


def not_recorded(call: _Call) -> _Call:
    """The same call of tensors that tell the other ranks of no gradients."""
    names = ("x",) if isinstance(call, DispatchCall) else ("expand_x", "expert_scales")
    given = {name: getattr(call, name) for name in names}
    wanting = {n: t.detach() for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    return replace(call, **wanting) if wanting else call


def as_recorded(call: Combining, dispatched: Dispatched) -> Combining:
    """The same call, whose rows tell the other ranks of gradients if those of x are recorded."""
    link, rows = dispatched.link, call.expand_x
    if link is None or not link.requires_grad or rows.requires_grad or not rows.is_floating_point():
        return call
    return replace(call, expand_x=rows.detach().requires_grad_())


def check_differentiable(call: DispatchCall[torch.Tensor] | CombineCall[torch.Tensor]) -> None:
    """Raise for a call with options that have no gradients.

    Raises:
        ConstraintError: naming the first of them.
    """
    fix = "call under torch.no_grad(), or use ExpertParallel"
    excluded: list[tuple[bool, str]] = [
        (call.tp_world_size == 2, "tp_world_size"),
        (call.elastic_info is not None, "elastic_info"),
        (call.copy_expert_num != 0, "copy_expert_num"),
        (call.const_expert_num != 0, "const_expert_num"),
    ]
    if isinstance(call, DispatchCall):
        excluded += [(call.quant_mode != 0, "quant_mode"), (call.scales is not None, "scales")]
    else:
        excluded.append((call.comm_quant_mode != 0, "comm_quant_mode"))
    for given, name in excluded:
        if given:
            value = getattr(call, name)
            said = "given" if isinstance(value, torch.Tensor) else value
            raise ConstraintError(name, f"{said} where gradients are recorded", "has no gradients", fix)


def check_threads(group: Transport, device: torch.device) -> None:
    """Raise where torch would compute the backward of ranks that wait for each other in one thread.

    Raises:
        ConstraintError: the ranks are threads, and the tensors on a device.
    """
    threads = isinstance(group, LocalTransport) and group.world_size > 1
    if threads and device.type != "cpu" and torch.autograd.is_multithreading_enabled():
        raise ConstraintError(
            "x",
            f"on the device {device} with gradients, in a world of threads",
            "must be on the CPU there: torch computes the backward of all threads in one thread of the device",
            "use processes, or wrap forward and backward in torch.autograd.set_multithreading_enabled(False)",
        )


def record_dispatch(dispatched: Dispatched, given: Mapping[str, Any]) -> Dispatched:
    """The same with an `expand_x` that is x's in torch's graph."""
    rows = dispatched.expand_x
    alone = replace(dispatched, expand_x=rows.new_empty(0))  # the graph does not keep the rows alive
    expand_x, link = _Dispatch.apply(given["x"], given["expert_ids"], alone, _same(given), (rows,))
    return replace(dispatched, expand_x=expand_x, link=link)


def record_combine(y: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """`y` as what the experts' outputs and the weights make in torch's graph."""
    taken = ("expert_out", "expert_scales", "expert_ids", "shared_expert_x")
    dispatched = given["dispatched"]
    same = _same(given)
    if same["num_experts"] is None:
        same["num_experts"] = dispatched.num_experts
    return _Combine.apply(*[given[name] for name in taken], dispatched.link, same, (y,))


def _same(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the other operator gets as this one did; the mask is copied, since its owner may write to it."""
    group = given["ep"] if given["group"] is None else given["group"]
    check_threads(transport_of(group, "ep"), given["expert_ids"].device)
    same = {name: given[name] for name in _SAME}
    if same["x_active_mask"] is not None:
        same["x_active_mask"] = same["x_active_mask"].clone()
    return same | {"elastic_info": None, "comm_alg": "", "limits": "unlimited"}


def _dispatch(x: torch.Tensor, ids: torch.Tensor, same: Mapping[str, Any]) -> Dispatched:
    with collective("dispatch", DispatchCall, {**same, "x": x, "expert_ids": ids}, x) as call:
        *outputs, number = perform("dispatch", call)
        return Dispatched(*outputs, num_experts=same["num_experts"], number=number)


def _combine(rows: torch.Tensor, ids: torch.Tensor, dispatched: Dispatched, same: Mapping[str, Any]) -> torch.Tensor:
    """With weights of 1."""
    arguments = {
        **same,
        "expand_x": rows,
        "expert_ids": ids,
        "expert_scales": torch.ones(ids.shape, dtype=torch.float32, device=ids.device),
        "assist_info_for_combine": dispatched.assist_info_for_combine,
        "ep_send_counts": dispatched.ep_recv_counts,
        "tp_send_counts": dispatched.tp_recv_counts,
        "dispatch_number": dispatched.number,
    }
    with collective("combine", CombineCall, arguments, rows) as call:
        return perform("combine", call)


class _Dispatch(torch.autograd.Function):
    """(x, expert_ids) -> expand_x, link."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        dispatched: Dispatched,
        same: dict[str, Any],
        made: tuple[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(expert_ids)
        ctx.set_materialize_grads(False)
        ctx.dispatched, ctx.same, ctx.shape, ctx.like = dispatched, same, made[0].shape, x.new_empty(0)
        return made[0], x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        check_once()
        rows = ctx.like.new_zeros(ctx.shape) if grads[0] is None else grads[0]
        return _combine(rows, ids, ctx.dispatched, ctx.same), None, None, None, None


class _Combine(torch.autograd.Function):
    """(expert_out, expert_scales, expert_ids, shared_expert_x, link) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        expert_out: torch.Tensor,
        expert_scales: torch.Tensor,
        expert_ids: torch.Tensor,
        shared_expert_x: torch.Tensor | None,
        link: torch.Tensor | None,
        same: dict[str, Any],
        made: tuple[torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(expert_out, expert_scales, expert_ids)
        ctx.set_materialize_grads(False)
        ctx.same, ctx.shape = same, made[0].shape
        # What this rank has told the others, which is what they have told it.
        ctx.told = expert_out.requires_grad or link is not None, expert_scales.requires_grad
        ctx.shared_shape = None if shared_expert_x is None else shared_expert_x.shape
        ctx.link = None if link is None else torch.zeros_like(link)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        expert_out, scales, ids = ctx.saved_tensors
        check_once()
        grad_y = expert_out.new_zeros(ctx.shape) if grads[0] is None else grads[0]
        grad_out = grad_scales = grad_shared = None
        if any(ctx.told):
            grad_out, grad_scales = _gradients_of_combine(ctx.same, grad_y, expert_out, scales, ids, ctx.told)
        of_rows, of_scales, of_shared, of_link = (ctx.needs_input_grad[i] for i in (0, 1, 3, 4))
        if of_shared:
            active = active_tokens(len(grad_y), ctx.same["x_active_mask"], grad_y.device)
            grad_shared = torch.where(active[:, None], grad_y, 0.0).view(ctx.shared_shape)
        return (
            grad_out if of_rows else None,
            grad_scales if of_scales else None,
            None,
            grad_shared,
            ctx.link if of_link else None,
            None,
            None,
        )


def _gradients_of_combine(
    same: Mapping[str, Any],
    grad_y: torch.Tensor,
    expert_out: torch.Tensor,
    scales: torch.Tensor,
    ids: torch.Tensor,
    told: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of `expert_out`, in its shape: weight · gradient, rounded once. Of the weights: dot products by `tree_sum`.

    Args:
        told: which of the two the ranks need.
    """
    back = _dispatch(grad_y, ids, same)
    weights = _dispatch(scales.detach(), ids, same).expand_x
    count, top_k = int(back.ep_recv_counts[-1]), ids.shape[1]
    k = back.assist_info_for_combine[2 : 3 * count : 3].long()
    routed = k < top_k  # a shared expert's is beyond, and its weight 1
    weight = torch.where(routed, weights[:count].gather(1, k.clamp(max=top_k - 1)[:, None])[:, 0], 1.0)
    grad_out, dots = torch.zeros_like(expert_out), weights.new_zeros((count, 1))
    for part in chunks(count, max(grad_y.shape[1], 1), grad_y.device):
        rows = back.expand_x[part].float()
        grad_out[part] = (weight[part, None] * rows).to(grad_out.dtype)
        dots[part, 0] = torch.where(routed[part], tree_sum(rows * expert_out[part].float()), 0.0)
    if not told[1]:
        return grad_out, None
    # Each dot product stands in the column of its k, so that the sum over a token's rows is all of them.
    wide = torch.zeros_like(weights)
    wide[:count].scatter_(1, k.clamp(max=top_k - 1)[:, None], dots)
    return grad_out if told[0] else None, _combine(wide, ids, back, same)
