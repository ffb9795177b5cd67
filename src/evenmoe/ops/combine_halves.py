"""MoeDistributeCombineSetup and MoeDistributeCombineTeardown: combine in two calls (specification §14).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, L experts of each, N rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenmoe.contract.combine_halves import (
    check_combine_setup_call,
    check_combine_teardown_call,
    infer_combine_setup,
)
from evenmoe.contract.half_calls import CombineSetupCall, CombineTeardownCall
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import active_tokens, check_physical_ids, stable_order
from evenmoe.ops.halves import attributes_of, finished, group_of, numbered, places, told
from evenmoe.ops.operator import Prepared, layout_sizes, register, specs_of
from evenmoe.ops.weighted_sum import add_rows
from evenmoe.transport.agreement import Header, dtype_code
from evenmoe.transport.call import GroupCall, Outgoing, together
from evenmoe.transport.transport import Transport

Setup = CombineSetupCall[torch.Tensor]
Teardown = CombineTeardownCall[torch.Tensor]


@dataclass(frozen=True)
class SetupPlan:
    """What follows from a setup's shapes and attributes: the layout, and what the ranks must agree on."""

    layout: Layout
    header: Header


@dataclass(frozen=True)
class Returned:
    """The rows that came back to this rank.

    Attributes:
        rows: (N, H), by the rank and the local expert that they come from, then in the order in which they were sent.
        counts: int64 (W, L), how many each rank sent of each of its experts.
    """

    rows: torch.Tensor
    counts: torch.Tensor


def _setup_plan(
    call: CombineSetupCall[TensorSpec], layout: Layout, elastic_info: tuple[int, ...] | None = None
) -> SetupPlan:
    sizes = {
        **layout_sizes(call, layout),
        "hidden size of `expert_out`": layout.hidden,
        "dtype of `expert_out`": dtype_code(call.expand_x.dtype),
    }
    return SetupPlan(layout, Header("setup of combine", sizes))


SETUP = Prepared("combine_setup", check_combine_setup_call, _setup_plan)
TEARDOWN = Prepared("combine_teardown", check_combine_teardown_call, lambda call, layout, elastic_info: layout)


def _set_up(call: Setup) -> tuple[torch.Tensor, torch.Tensor]:
    ep = group_of(call)
    with told(ep, "combine"):
        plan = SETUP(call)
        counts = _counts(call, plan.layout)
        source = torch.arange(plan.layout.ep, device=counts.device).repeat(plan.layout.local_experts)
        order = stable_order(torch.repeat_interleave(source, counts.flatten()), plan.layout.ep)
        rows = call.expand_x.index_select(0, order)  # a copy, since the caller may write to its own
        number = ep.setups.begin("combine", _about(call), lambda: _exchange(ep, plan, counts.T.contiguous(), rows))
    message, info = infer_combine_setup(specs_of(call)).values()
    quantized = torch.zeros(message.shape, dtype=torch.int8, device=rows.device)
    return quantized, numbered(number, info.shape[0], rows.device)


def _counts(call: Setup, layout: Layout) -> torch.Tensor:
    """int64 (L, W): rows of each local expert for each rank, from their running sum."""
    running = call.assist_info_for_combine[: layout.ep * layout.local_experts].long()
    counts = torch.diff(running, prepend=running.new_zeros(1)).view(layout.local_experts, layout.ep)
    rows = int(running[-1])
    most = min(layout.capacity, len(call.expand_x))
    if bool((counts < 0).any()) or bool((counts > layout.max_bs).any()) or rows > most:
        value = f"{running.tolist() if len(running) <= 16 else f'[{running[0]}, …, {rows}]'}"
        rule = f"must be a running sum of 0 to {layout.max_bs} rows each, and of at most {most}"
        fix = "pass what the teardown of dispatch gave, unchanged"
        raise ConstraintError("assist_info_for_combine", value, rule, fix)
    return counts


def _about(call: Setup | Teardown) -> dict[str, object]:
    return {
        **attributes_of(call),
        "expert_ids": call.expert_ids.clone() if isinstance(call, CombineSetupCall) else call.expert_ids,
    }


def _exchange(ep: Transport, plan: SetupPlan, counts: torch.Tensor, rows: torch.Tensor) -> Returned:
    with together(part := GroupCall(ep, "setup of combine", rows)):
        outgoing = Outgoing([0] * ep.world_size, counts.sum(1).tolist(), rows.shape[1:], rows)
        theirs, incoming = part.send(plan.header, counts, outgoing, rows)
        return Returned(incoming.take(), theirs)


def _tear_down(call: Teardown) -> torch.Tensor:
    ep, layout = group_of(call), TEARDOWN(call)
    ids, mask = call.expert_ids, call.x_active_mask
    active = active_tokens(layout.num_tokens, mask, ids.device)[:, None].expand(ids.shape)
    if call.check_values:
        check_physical_ids(ids, active, layout.num_experts)
    returned = finished(ep, "combine", call, _about(call))
    assert isinstance(returned, Returned)
    counts = returned.counts.flatten()  # by expert, since no rank holds a shared one
    experts = ids.clamp(0, layout.num_experts - 1).long()
    place = call.expand_idx.view(ids.shape).long()
    there = active & (place >= 0) & (place < counts[experts])
    if call.check_values:
        _check_returned(call, place, there, active, counts, layout)
    position = torch.where(there, (counts.cumsum(0) - counts)[experts] + place, -1)
    total = torch.zeros((layout.num_tokens, layout.hidden), dtype=torch.float32, device=ids.device)
    add_rows(total, returned.rows, position, call.expert_scales)
    return total.to(call.expand_x.dtype)


def _check_returned(
    call: Teardown,
    place: torch.Tensor,
    there: torch.Tensor,
    active: torch.Tensor,
    counts: torch.Tensor,
    layout: Layout,
) -> None:
    """Every entry that counts has the row of its own; one of weight 0 may lack it, since it would add nothing."""
    wanted = places(call.expert_ids, call.x_active_mask, layout.num_experts).view(place.shape)
    wrong = active & (call.expert_scales != 0) & (~there | (place != wanted))
    if wrong.any():
        token, k = wrong.nonzero()[0].tolist()
        expert = int(call.expert_ids[token, k])
        value = f"{int(place[token, k])} for token {token}, k {k}"
        rule = f"must be {int(wanted[token, k])}, below the {int(counts[expert])} rows that expert {expert} returned"
        raise ConstraintError("expand_idx", value, rule, "pass what the setup of dispatch gave, and the same mask")
    due = torch.bincount(call.expert_ids[active].long().clamp(0, layout.num_experts - 1), minlength=layout.num_experts)
    if bool((counts > due).any()):
        expert = int((counts > due).nonzero()[0])
        value = f"such that {int(due[expert])} rows of expert {expert} are due, while {int(counts[expert])} came"
        rule = "must be the ids that dispatch was called with, with the same mask"
        raise ConstraintError("expert_ids", value, rule, "pass the tensors of one dispatch")


def _fake_setup(call: Setup) -> tuple[torch.Tensor, ...]:
    specs = specs_of(call)
    check_combine_setup_call(specs)
    outputs = infer_combine_setup(specs).values()
    return tuple(call.expand_x.new_zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs)


def _fake_teardown(call: Teardown) -> torch.Tensor:
    layout = check_combine_teardown_call(specs_of(call))
    return call.expand_x.new_zeros((layout.num_tokens, layout.hidden))


register("combine_setup", CombineSetupCall, _set_up, _fake_setup)
register("combine_teardown", CombineTeardownCall, _tear_down, _fake_teardown)
