"""MoeDistributeDispatchV2: send every token to the ranks of its experts (specification §2).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, L experts per MoE rank, N rows received from the expert
parallel group, A capacity in rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evenmoe.contract.calls import DispatchCall
from evenmoe.contract.comm_alg import is_hierarchy
from evenmoe.contract.dispatch import check_dispatch_call, infer_dispatch
from evenmoe.contract.layout import Layout, scale_down
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.dispatched import Dispatched
from evenmoe.ops.exchange import (
    Received,
    Routing,
    check_physical_ids,
    check_room,
    prepare_sending,
    received,
    route,
    sent_assignments,
    zeros,
)
from evenmoe.ops.gradients import check_differentiable, needed, not_recorded, record_dispatch
from evenmoe.ops.numerics import DYNAMIC_INT8, quantize_rows, reinterpret
from evenmoe.ops.operator import (
    Dispatching,
    Prepared,
    active_ranks,
    collective,
    common_sizes,
    elastic_values,
    find_groups,
    in_order,
    parts_of,
    perform,
    register,
    specs_of,
)
from evenmoe.transport.agreement import GRADIENTS_OF_X, NEEDED, OFF, UNKNOWN, Header, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Outgoing
from evenmoe.transport.process_world import Group

Outputs = Sequence[torch.Tensor]


def dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    *,
    num_experts: int,
    ep: Group | None = None,
    tp: Group | None = None,
    group: Group | None = None,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str | None = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    check_values: bool = True,
    limits: str | None = "relaxed",
) -> Dispatched:
    """Send each token to the ranks that hold its experts; a collective of the whole world.

    A token crosses once per destination rank, not once per expert; the outputs are the operator's. `expand_x` is
    differentiable in x, unless rows are int8, expert-specific (`scales`), or shared by tensor-parallel peers, the world
    is scaled down, or there are copy or const experts.

    Args:
        x: float16, bfloat16 (or float32, beyond the chip) (Bs, H), the tokens of this rank.
        expert_ids: int32 (Bs, K), physical expert ids, distinct within a token. Ids of `num_experts` and above are
            virtual (zero, copy, const experts) and stay on this rank.
        num_experts: M, physical experts (slots) over all MoE ranks.
        ep, group: the expert-parallel group, by either name: this rank's transport (`rank.ep` of a world), a
            torch.distributed ProcessGroup, or one axis of a DeviceMesh.
        tp: the group of the two tensor-parallel peers, of the same kinds, or None. With two peers, one expert per rank.
        scales: float32 (shared experts + M, H), smooth factors; only with quant_mode 2.
        x_active_mask: bool (Bs,), of which only the number of True counts (they come first), or bool (Bs, K).
        expert_scales: float32 (Bs, K), gate weights, which arrive in `expand_scales`, or None. On all ranks or on none.
        performance_info: None; waiting times are not measured here.
        elastic_info: int32 (4 + 2·W,), the scaled-down world (§2.11).
        expert_shard_type: 0, shared-expert ranks come first.
        shared_expert_num, shared_expert_rank_num: shared experts, and the ranks 0… that host them.
        quant_mode: 0 to send rows as they are, 2 for int8 with one scale per row.
        global_bs: 0, or W · (the largest Bs of any rank) when ranks have different numbers of tokens.
        expert_token_nums_type: 1 for counts, 0 for prefix sums.
        comm_alg: "", "fullmesh_v1", "fullmesh_v2" or "hierarchy"; what is written is the same.
        zero_expert_num, copy_expert_num, const_expert_num: virtual experts.
        check_values: check that ids are in range and not repeated within a token. False saves the pass, and takes
            repeated ids as the chip does: their rows are sent as often, which is an error only where they find no room.
        limits: "atlas-a3" for exactly the chip's ranges ("atlas-a3-2025" and "atlas-a3-2026" for those of one release),
            "relaxed" for its maxima with small worlds allowed, or "unlimited".

    Returns:
        `Dispatched`, the seven outputs; unwritten regions are zero.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §2.13.
        RankDisagreementError: the ranks' calls or sizes differ, or the call was invalid or failed on another rank; the
            same on every rank. The group is in step then: the next call that all ranks make is right.
        LostRankError: a rank is gone or was interrupted; `.ranks` says which. The group is closed for good.

    Each of two ranks holds one expert and sends its two tokens to expert 1 and expert 0:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     x = torch.tensor([[10.0 * rank.index], [10.0 * rank.index + 1]])
    ...     ids = torch.tensor([[1], [0]], dtype=torch.int32)
    ...     d = em.dispatch(x, ids, ep=rank.ep, num_experts=2)
    ...     return d.expand_x[:2, 0].tolist(), d.ep_recv_counts.tolist()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)
    [([1.0, 11.0], [1, 2]), ([0.0, 10.0], [1, 2])]
    """
    given = locals()
    with collective("dispatch", DispatchCall, given, x) as call:
        recorded = needed(x)
        if recorded:
            check_differentiable(call)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not recorded):
            *outputs, number = perform("dispatch", call if recorded else not_recorded(call))
    dispatched = Dispatched(*outputs, num_experts=num_experts, number=number)
    return record_dispatch(dispatched, given) if recorded else dispatched


@dataclass(frozen=True)
class DispatchPlan:
    """What follows from a call's shapes and attributes.

    Attributes:
        layout: who holds what.
        headers: what the ranks must agree on, by whether gradients of x are recorded.
        outputs: shape and dtype of each.
    """

    layout: Layout
    headers: dict[bool, Header]
    outputs: list[tuple[tuple[int, ...], torch.dtype]]


def make_plan(
    call: DispatchCall[TensorSpec], layout: Layout, elastic_info: tuple[int, ...] | None = None
) -> DispatchPlan:
    """The plan of a checked call of dispatch, in the world that `elastic_info` leaves."""
    if elastic_info is not None:
        layout = scale_down(layout, elastic_info, smooth_scales=call.scales is not None)
    sizes = common_sizes(call, layout) | {
        "hidden size of `x`": layout.hidden,
        "dtype of `x`": dtype_code(call.x.dtype),
        "`quant_mode`": call.quant_mode,
        "presence of `scales`": call.scales is not None,
        "presence of `expert_scales`": call.sends_expert_scales,
    }
    outputs = infer_dispatch(layout, call.x.dtype, call.quant_mode, is_hierarchy(call)).values()
    headers = {
        recorded: Header("dispatch", sizes | {GRADIENTS_OF_X: NEEDED if recorded else OFF})
        for recorded in (False, True)
    }
    return DispatchPlan(layout, headers, [(spec.shape, getattr(torch, spec.dtype)) for spec in outputs])


PREPARED = Prepared("dispatch", check_dispatch_call, make_plan)


def _run(call: Dispatching) -> tuple[torch.Tensor, ...]:
    ep, tp = find_groups(call)
    scaled_down = call.elastic_info is not None
    across, beside = parts_of("dispatch", ep, tp, scaled_down, call.x)
    with together(*in_order("dispatch", across, beside)):
        plan = PREPARED(call, elastic_values(call))
        if scaled_down:
            across.narrow(active_ranks(ep, plan.layout))
        layout = plan.layout
        if call.check_values:
            sent = sent_assignments(call.expert_ids, layout, call.x_active_mask)
            check_physical_ids(call.expert_ids, sent, layout.num_experts + call.virtual_experts)
        number = torch.tensor([across.number, UNKNOWN if beside is None else beside.number])
        routing = route(call.expert_ids, layout, call.x_active_mask)
        outputs, here = exchange_across(across, plan, call, routing, local=tp is None)
        peer = None if beside is None else exchange_with_peer(here, beside, layout)
        fill(outputs, here, peer, call)
        assist_info, own = outputs[2], len(here.rows)
        assist_info[: 3 * own] = torch.stack([here.source, here.token, here.k], dim=1).flatten()
        return (*outputs, number)


def exchange_across(
    part: GroupCall, plan: DispatchPlan, call: Dispatching, routing: Routing, local: bool
) -> tuple[Outputs, Received]:
    """The exchange of the expert-parallel group; the outputs, of which expand_x may be filled already.

    Args:
        routing: what goes where.
        local: what is received is not handed on to a peer, who would read it while the caller writes to it.
    """
    x, layout, quantized = call.x, plan.layout, call.quant_mode == DYNAMIC_INT8
    sending = prepare_sending(
        routing,
        layout.num_tokens,
        (layout.hidden + 4,) if quantized else (layout.hidden,),  # H int8 and one float32 scale, as bytes
        x.new_empty(0, dtype=torch.uint8) if quantized else x,
        rows_differ_by_expert=call.scales is not None,
        weights=call.expert_scales if call.sends_expert_scales else None,
    )
    rows, index = x, sending.token
    if quantized:
        # Rows as they travel: bytes, H int8 and one float32 scale.
        smooth = None if call.scales is None else call.scales.index_select(0, routing.expert)
        values, scale = quantize_rows(x.index_select(0, sending.token), smooth)
        rows, index = torch.cat([values.view(torch.uint8), reinterpret(scale[:, None], torch.uint8)], dim=1), None
    # There may be too many rows, which all ranks must hear of before they travel. A shared-expert rank has one local
    # expert, and every source counts for it in column 0.
    counts = part.agree(plan.headers[x.requires_grad], routing.counts, sending.outgoing)[:, : layout.local_experts]
    check_room(counts, layout, call.global_bs)
    incoming = part.exchange(rows.detach() if rows.requires_grad else rows, index, sending.assignments)
    # The rows go where they stay, unless their scales come beside them. Of A rows few are ever received.
    in_place = local and not quantized
    outputs = []
    for output_shape, dtype in plan.outputs:
        memory = None
        if in_place and not outputs:
            memory = part.group.new_rows(output_shape, x, filled=int(counts.sum()))
        outputs.append(zeros(output_shape, dtype, x.device) if memory is None else memory)
    allocate = (lambda n: outputs[0][:n]) if in_place else None
    return outputs, received(part, sending, counts, incoming, allocate)


@dataclass(frozen=True)
class Peer:
    """What the tensor-parallel peer holds: its rows (n, …) as they travelled, its counts int64 (ep,)."""

    rows: torch.Tensor
    ep_counts: torch.Tensor


def exchange_with_peer(received: Received, part: GroupCall, layout: Layout) -> Peer:
    """§2.12: after the expert-parallel exchange each peer gives the other all of its rows."""
    rows = received.rows
    sizes = {
        "hidden size of `x`": layout.hidden,
        "dtype of the rows": dtype_code(rows.dtype),
        "tokens per rank times ranks (`global_bs`)": layout.global_bs,
        "expert parallel rank": layout.rank,
    }
    peer = 1 - part.group.rank
    mine = received.counts[:, 0]  # a world with two peers has one expert per rank
    to_each = [0, 0]
    to_each[peer] = len(rows)
    header, outgoing = (
        Header("tensor-parallel step of dispatch", sizes),
        Outgoing([0, 0], to_each, rows.shape[1:], rows),
    )
    theirs = part.agree(header, mine.expand(2, -1), outgoing)[peer]
    incoming = part.exchange(rows)
    first = incoming.first[peer]
    return Peer(incoming.take()[first : first + incoming.rows[peer]], theirs)


def fill(outputs: Outputs, received: Received, peer: Peer | None, call: Dispatching) -> None:
    """All outputs but the third, which says where the rows came from."""
    expand_x, dynamic_scales, _, token_nums, ep_recv_counts, tp_recv_counts, expand_scales = outputs
    own = len(received.rows)
    rows = received.rows if peer is None else torch.cat([received.rows, peer.rows])
    if call.quant_mode == DYNAMIC_INT8:
        hidden = call.x.shape[1]
        dynamic_scales[: len(rows)] = reinterpret(rows[:, hidden:], torch.float32)[:, 0]
        rows = rows[:, :hidden].view(torch.int8)
    if call.quant_mode == DYNAMIC_INT8 or peer is not None:  # else they were gathered where they stay
        expand_x[: len(rows)] = rows
    if received.weight is not None:
        expand_scales[:own] = received.weight
    ordered = received.counts.T.flatten()  # (local expert, source rank)
    ep_recv_counts[: len(ordered)] = ordered.cumsum(0)
    per_expert = received.counts.sum(dim=0)
    if peer is not None:
        ep_recv_counts[len(ordered) : 2 * len(ordered)] = peer.ep_counts.cumsum(0)
        per_expert = per_expert + len(peer.rows)
        tp_recv_counts[call.tp_rank_id] = own
        tp_recv_counts[1 - call.tp_rank_id] = len(peer.rows)
    token_nums[: len(per_expert)] = per_expert if call.expert_token_nums_type == 1 else per_expert.cumsum(0)


def _fake(call: Dispatching) -> tuple[torch.Tensor, ...]:
    specs = specs_of(call)
    outputs = infer_dispatch(check_dispatch_call(specs), specs.x.dtype, call.quant_mode, is_hierarchy(specs)).values()
    number = torch.empty((2,), dtype=torch.int64)
    return (*[call.x.new_zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs], number)


register("dispatch", DispatchCall, _run, _fake)
