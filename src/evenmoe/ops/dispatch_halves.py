"""MoeDistributeDispatchSetup and MoeDistributeDispatchTeardown: dispatch in two calls (specification §14).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, L experts of this rank, N rows received, A capacity in rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenmoe.contract.dispatch_halves import (
    check_dispatch_setup_call,
    check_dispatch_teardown_call,
    infer_dispatch_setup,
    infer_dispatch_teardown,
)
from evenmoe.contract.half_calls import DispatchSetupCall, DispatchTeardownCall
from evenmoe.contract.halves import aligned
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.ops.exchange import (
    Received,
    Routing,
    active_assignments,
    check_physical_ids,
    check_room,
    prepare_sending,
    received,
    route,
)
from evenmoe.ops.halves import attributes_of, finished, group_of, numbered, places, told
from evenmoe.ops.numerics import DYNAMIC_INT8, quantize_rows, reinterpret
from evenmoe.ops.operator import Prepared, layout_sizes, register, specs_of
from evenmoe.transport.agreement import Header, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.transport import Transport

Setup = DispatchSetupCall[torch.Tensor]
Teardown = DispatchTeardownCall[torch.Tensor]


@dataclass(frozen=True)
class SetupPlan:
    """What follows from a setup's shapes and attributes: the layout, what the ranks agree on, and the outputs."""

    layout: Layout
    header: Header
    outputs: list[TensorSpec]


def _setup_plan(
    call: DispatchSetupCall[TensorSpec], layout: Layout, elastic_info: tuple[int, ...] | None = None
) -> SetupPlan:
    sizes = {
        **layout_sizes(call, layout),
        "hidden size of `x`": layout.hidden,
        "dtype of `x`": dtype_code(call.x.dtype),
        "`quant_mode`": call.quant_mode,
        "presence of `scales`": call.scales is not None,
    }
    return SetupPlan(layout, Header("setup of dispatch", sizes), list(infer_dispatch_setup(call, layout).values()))


SETUP = Prepared("dispatch_setup", check_dispatch_setup_call, _setup_plan)
TEARDOWN = Prepared("dispatch_teardown", check_dispatch_teardown_call, lambda call, layout, elastic_info: layout)


def _set_up(call: Setup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ep = group_of(call)
    with told(ep, "dispatch"):
        plan = SETUP(call)
        layout = plan.layout
        if call.check_values:
            sent = torch.ones_like(call.expert_ids, dtype=torch.bool)
            if call.x_active_mask is not None:
                sent = active_assignments(call.expert_ids, call.x_active_mask)
            check_physical_ids(call.expert_ids, sent, layout.num_experts)
        routing = route(call.expert_ids, layout, call.x_active_mask)
        message = _message(call, routing, layout)
        about = _about(call)
        number = ep.setups.begin("dispatch", about, lambda: _exchange(ep, plan, call, routing, message))
    y, _, info = plan.outputs
    written = torch.zeros(y.shape, dtype=getattr(torch, y.dtype), device=call.x.device)
    written[rows_of(routing, layout), : message.shape[1]] = message
    index = places(call.expert_ids, call.x_active_mask, layout.num_experts)
    return written, index, numbered(number, info.shape[0], call.x.device)


def rows_of(routing: Routing, layout: Layout) -> torch.Tensor:
    """int64 (N,): the row of `y` of every assignment: by expert, and those of shared experts behind Bs·K others."""
    shared = routing.k >= layout.top_k
    behind = layout.num_tokens * layout.top_k
    return torch.where(shared, behind + shared.cumsum(0) - 1, (~shared).cumsum(0) - 1)


def message_width(hidden: int, quantized: bool) -> int:
    """Columns of `y` that are written: a token, or an int8 token with its scale."""
    return aligned(hidden, 32) + 4 if quantized else hidden


def _message(call: Setup, routing: Routing, layout: Layout) -> torch.Tensor:
    """The rows as they travel, (N, columns), one for each assignment: copies, since the caller may write to x."""
    rows = call.x.index_select(0, routing.token)
    if call.quant_mode != DYNAMIC_INT8:
        return rows
    smooth = None
    if call.scales is not None:  # a row for every shared expert comes first, whether ranks hold them or not
        smooth = call.scales.index_select(0, routing.expert + (call.shared_expert_num - layout.shared_experts))
    values, scale = quantize_rows(rows, smooth)
    message = torch.zeros(
        (len(rows), message_width(layout.hidden, quantized=True)), dtype=torch.int8, device=rows.device
    )
    message[:, : layout.hidden] = values
    message[:, -4:] = reinterpret(scale[:, None], torch.int8)
    return message


def _about(call: Setup | Teardown) -> dict[str, object]:
    return {
        **attributes_of(call),
        "quant_mode": call.quant_mode,
        "expert_ids": call.expert_ids.clone() if isinstance(call, DispatchSetupCall) else call.expert_ids,
    }


def _exchange(ep: Transport, plan: SetupPlan, call: Setup, routing: Routing, message: torch.Tensor) -> Received:
    with together(part := GroupCall(ep, "setup of dispatch", message)):
        layout = plan.layout
        sending = prepare_sending(routing, layout.num_tokens, message.shape[1:], message, rows_differ_by_expert=True)
        # There may be too many rows, which all ranks must hear of before they travel.
        counts = part.agree(plan.header, routing.counts, sending.outgoing)[:, : layout.local_experts]
        check_room(counts, layout, call.global_bs)
        return received(part, sending, counts, part.exchange(message, numbers=sending.assignments))


def _tear_down(call: Teardown) -> tuple[torch.Tensor, ...]:
    ep, layout = group_of(call), TEARDOWN(call)
    received = finished(ep, "dispatch", call, _about(call))
    assert isinstance(received, Received)
    expand_x, dynamic_scales, assist, token_nums = (
        torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=call.x.device)
        for spec in infer_dispatch_teardown(specs_of(call), layout).values()
    )
    rows = len(received.rows)
    expand_x[:rows] = received.rows[:, : layout.hidden]
    if call.quant_mode == DYNAMIC_INT8:
        dynamic_scales[:rows] = reinterpret(received.rows[:, -4:], torch.float32)[:, 0]
    running = received.counts.T.flatten().cumsum(0)
    assist[: len(running)] = running
    token_nums[:] = received.counts.sum(dim=0)
    return expand_x, dynamic_scales, assist, token_nums


def _fake_setup(call: Setup) -> tuple[torch.Tensor, ...]:
    specs = specs_of(call)
    outputs = infer_dispatch_setup(specs, check_dispatch_setup_call(specs)).values()
    return tuple(call.x.new_zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs)


def _fake_teardown(call: Teardown) -> tuple[torch.Tensor, ...]:
    specs = specs_of(call)
    outputs = infer_dispatch_teardown(specs, check_dispatch_teardown_call(specs)).values()
    return tuple(call.x.new_zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs)


register("dispatch_setup", DispatchSetupCall, _set_up, _fake_setup)
register("dispatch_teardown", DispatchTeardownCall, _tear_down, _fake_teardown)
