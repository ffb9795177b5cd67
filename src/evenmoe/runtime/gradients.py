"""The backward of `ExpertParallel`: dispatch and combine as nodes of torch's graph, and what they exchange.

The backward of dispatch is a combine of gradients without weights, that of combine a dispatch of gradients. Both go
over the way that the forward chose, in its order, on every rank that took part, whether or not it needs a gradient.

Shapes: T tokens of this rank, H hidden, K experts per token, W ranks, L slots of this rank, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

import torch

from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import prepare_sending, received_order
from evenmoe.ops.gradients import check_once, check_threads
from evenmoe.ops.numerics import reinterpret, tree_sum
from evenmoe.ops.weighted_sum import chunks, sum_dtype, sum_rows
from evenmoe.rules.rule import IntArray
from evenmoe.runtime.rows import DispatchedRows, return_rows
from evenmoe.transport.agreement import LAYER, NEEDED, OFF, ON, Header
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.transport import Transport

_DISPATCH, _COMBINE = "backward of ExpertParallel.dispatch", "backward of ExpertParallel.combine"
_WEIGHTS = f"{_COMBINE}, for the weights"


def state_of(*tensors: torch.Tensor | None) -> int:
    """What this rank says of the gradients of these tensors together: OFF, ON or NEEDED."""
    if not torch.is_grad_enabled():
        return OFF
    return NEEDED if any(tensor is not None and tensor.requires_grad for tensor in tensors) else ON


@dataclass(frozen=True)
class Way:
    """The way of one dispatch's rows, as the backward goes it again.

    Attributes:
        group: over which they went. dispatched: what came of it, without the rows themselves.
    """

    group: Transport
    dispatched: DispatchedRows

    def header(self, operator: str) -> Header:
        return _header(operator, self.dispatched.layer)

    def check_recomputed(self, slots: torch.Tensor) -> None:
        """Raise if activation checkpointing has computed the dispatch again, and it chose other slots than before."""
        first = self.dispatched.slots
        if slots.data_ptr() != first.data_ptr() and not torch.equal(slots, first):
            raise ConstraintError(
                "topk_ids",
                "such that tokens went to other slots when activation checkpointing computed the dispatch again",
                "must be the same both times",
                "make the router repeat itself: keep checkpoint's preserve_rng_state, and leave out noise of its own",
            )


def way_of(group: Transport, dispatched: DispatchedRows) -> Way:
    """The way of `dispatched`, which keeps neither its rows nor the graph behind them."""
    rows = dispatched.rows
    check_threads(group, rows.device)
    weights = dispatched.topk_weights.detach()
    return Way(
        group,
        replace(dispatched, rows=rows.new_empty((0, *rows.shape[1:])), topk_weights=weights, partial=None, link=None),
    )


class Chosen:
    """What a rule chose for batches whose backward may still come, so that it chooses the same when asked again.

    Activation checkpointing computes a dispatch again in the backward. A rule that draws at random, or that remembers
    what it chose, would send the tokens elsewhere the second time, away from what the first one recorded.
    """

    def __init__(self) -> None:
        self._slots: WeakValueDictionary[bytes, torch.Tensor] = WeakValueDictionary()  # the graph holds them

    def again(
        self, topk_ids: torch.Tensor, by_rank: IntArray | None, choose: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What was chosen for these ids, and counts of all ranks, if a graph that it is part of is still there."""
        key = b"" if by_rank is None else by_rank.tobytes()
        key = blake2b(key + str(topk_ids.shape).encode() + topk_ids.cpu().numpy().tobytes()).digest()
        slots = self._slots.get(key)
        if slots is None:
            slots = self._slots[key] = choose()
        return slots


# The nodes ----------------------------------------------------------------------------------------------------------


def record_dispatch(group: Transport, dispatched: DispatchedRows, x: torch.Tensor) -> DispatchedRows:
    """The same with rows that are x's in torch's graph, on a rank whose x needs no gradient, too."""
    rows, link = _Dispatch.apply(x, _anchor(x), dispatched.slots, way_of(group, dispatched), (dispatched.rows,))
    return replace(dispatched, rows=rows, link=link)


def record_combine(
    group: Transport,
    dispatched: DispatchedRows,
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    y: torch.Tensor,
    needed: tuple[bool, bool],
) -> torch.Tensor:
    """`y` as what `expert_out` and `weights` make in torch's graph.

    Args:
        needed: whether some rank needs gradients of `expert_out`, and of `weights`.
    """
    link = _anchor(y) if dispatched.link is None else dispatched.link
    return _Combine.apply(expert_out, weights, link, dispatched.slots, way_of(group, dispatched), needed, (y,))


def _anchor(like: torch.Tensor) -> torch.Tensor:
    """(0,), what makes a node record although nothing that it is computed from may need a gradient on this rank."""
    return torch.empty(0, device=like.device, requires_grad=True)


# What is saved for the backward is saved on every rank, and unpacked there before anything else: activation
# checkpointing computes the forward again when the first saved tensor is asked for, and with it its exchanges.


class _Dispatch(torch.autograd.Function):
    """(x, anchor) -> rows, link."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, slots: torch.Tensor, way: Way, made: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(slots)
        ctx.set_materialize_grads(False)
        ctx.way, ctx.shape, ctx.like = way, made[0].shape, x.new_empty(0)
        return made[0], torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        grad_rows = ctx.like.new_zeros(ctx.shape) if grads[0] is None else grads[0]
        grad_x = gradient_of_x(ctx.way, grad_rows, slots)
        return grad_x if ctx.needs_input_grad[0] else None, None, None, None, None


class _Combine(torch.autograd.Function):
    """(expert_out, weights, link) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        expert_out: torch.Tensor,
        weights: torch.Tensor,
        link: torch.Tensor,
        slots: torch.Tensor,
        way: Way,
        needed: tuple[bool, bool],
        made: tuple[torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(expert_out, weights, slots)
        ctx.set_materialize_grads(False)
        ctx.way, ctx.needed, ctx.link = way, needed, torch.zeros_like(link)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        expert_out, weights, slots = ctx.saved_tensors
        grad_y = expert_out.new_zeros((len(weights), expert_out.shape[1])) if grads[0] is None else grads[0]
        grad_out, grad_weights = gradients_of_combine(ctx.way, grad_y, expert_out, weights, slots, ctx.needed)
        needs_out, needs_weights, needs_link = ctx.needs_input_grad[:3]
        return (
            grad_out if needs_out else None,
            grad_weights if needs_weights else None,
            ctx.link if needs_link else None,
            *[None] * 4,
        )


# What they exchange -------------------------------------------------------------------------------------------------


def gradient_of_x(way: Way, grad_rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The sum over a token's rows, k ascending, in `sum_dtype`, rounded once; a collective of the group.

    Args:
        grad_rows: (R, H), the gradients of the dispatched rows.
        slots: (T, K), those that the forward chose, the last time that it was computed.

    Returns:
        (T, H), dtype of `grad_rows`.
    """
    call = GroupCall(way.group, _DISPATCH, grad_rows)
    with together(call):
        check_once()
        way.check_recomputed(slots)
        incoming, position = return_rows(call, way.header(_DISPATCH), way.dispatched, grad_rows)
        ones = torch.ones(position.shape, dtype=sum_dtype(grad_rows.dtype), device=position.device)
        return sum_rows(incoming, position, ones)


def gradients_of_combine(
    way: Way,
    grad_y: torch.Tensor,
    expert_out: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    needed: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the experts' outputs and the weights get of the gradient of their sum; a collective of the group.

    Args:
        grad_y: (T, H), dtype of `expert_out`. expert_out: (R, H). weights: (T, K) of `sum_dtype`.
        slots: (T, K), those that the forward chose, the last time that it was computed.
        needed: which of the two some rank needs.

    Returns:
        (R, H), weight · gradient, rounded once; and (T, K), the dot product of gradient and output in `tree_sum`'s
        order, 0 where nothing is computed. None for what no rank needs.
    """
    dispatched, routing = way.dispatched, way.dispatched.routing
    call = GroupCall(way.group, _COMBINE, grad_y)
    with together(call):
        check_once()
        way.check_recomputed(slots)
        sending = prepare_sending(routing, len(grad_y), (grad_y.shape[1],), grad_y)
        # With each assignment goes the row of its token, and its weight as bits.
        bits = reinterpret(weights[routing.token, routing.k][:, None], torch.int32)
        numbers = torch.cat([sending.assignments[:, 2:], bits], dim=1)
        per_rank = [numbers.shape[1] * count for count in routing.counts.sum(dim=1).tolist()]
        outgoing = replace(sending.outgoing, numbers=per_rank)
        nothing = torch.zeros((call.group.world_size, 0), dtype=torch.int64)
        header = way.header(_COMBINE)
        _, incoming = call.send(header, nothing, outgoing, grad_y, sending.token, numbers, dispatched.number)
        order, source = received_order(_counts(dispatched, call.group.world_size))
        theirs = incoming.numbers.view(-1, numbers.shape[1])[order]
        first = torch.from_numpy(incoming.first).to(source.device)[source]
        rows = incoming.take(first + theirs[:, 0])
    grad_out = grad_weights = None
    if needed[1]:
        grad_weights = _return_dots(way, rows, expert_out, weights)
    if needed[0]:
        weight = reinterpret(theirs[:, 1:], weights.dtype)
        grad_out = torch.empty_like(rows)
        for part in chunks(len(rows), max(rows.shape[1], 1), rows.device):
            grad_out[part] = weight[part] * rows[part].to(weights.dtype)
    return grad_out, grad_weights


def _return_dots(way: Way, grads: torch.Tensor, expert_out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(T, K), each row's dot product, back at its token."""
    dots = weights.new_empty((len(grads), 1))
    for part in chunks(len(grads), max(grads.shape[1], 1), grads.device):
        dots[part, 0] = tree_sum(grads[part].to(dots.dtype) * expert_out[part].to(dots.dtype))
    call = GroupCall(way.group, _WEIGHTS, dots)
    with together(call):
        incoming, position = return_rows(call, way.header(_WEIGHTS), way.dispatched, dots)
        returned, due = weights.new_zeros(position.shape), position >= 0
        returned[due] = incoming.take(position[due])[:, 0]
        return returned


def _counts(dispatched: DispatchedRows, world_size: int) -> torch.Tensor:
    """int64 (W, L), rows from every source for every slot of this rank."""
    per_slot = dispatched.num_tokens_per_expert
    key = dispatched.source_rank * len(per_slot) + torch.repeat_interleave(per_slot)
    return torch.bincount(key, minlength=world_size * len(per_slot)).view(world_size, -1)


@cache
def _header(operator: str, layer: int) -> Header:
    return Header(operator, {LAYER: layer})
