"""MoeDistributeCombine, the first version: rows return by counts alone, and find their tokens by expand_idx (§3.8).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, L experts per MoE rank, N rows of this rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from evenmoe.contract.calls import CombineV1Call
from evenmoe.contract.first_version import check_combine_v1_call
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError
from evenmoe.ops.combine import CombinePlan, add_peer_rows, dispatch_number, own_rows
from evenmoe.ops.combine import make_plan as make_v2_plan
from evenmoe.ops.dispatch_v1 import route_v1, shared_places
from evenmoe.ops.exchange import check_physical_ids, prepare_returning
from evenmoe.ops.numerics import BLOCK_INT8, pack_blocks, unpack_blocks
from evenmoe.ops.operator import Prepared, find_groups, in_order, parts_of, register
from evenmoe.ops.weighted_sum import rounded_sums
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Incoming

Combining = CombineV1Call[torch.Tensor]


def make_plan(call: CombineV1Call[TensorSpec], layout: Layout, _: object = None) -> CombinePlan:
    """The plan of a checked call."""
    return make_v2_plan(replace(call, x_active_mask=None), layout, operator="combine_v1")


PREPARED = Prepared("combine_v1", check_combine_v1_call, make_plan)


def _run(call: Combining) -> torch.Tensor:
    ep, tp = find_groups(call)
    across, beside = parts_of("combine_v1", ep, tp, False, call.expand_x)
    with together(*in_order("combine_v1", across, beside)):
        plan = PREPARED(call)
        layout, call = plan.layout, replace(call, x_active_mask=None)
        if call.check_values:
            everything = torch.ones_like(call.expert_ids, dtype=torch.bool)
            check_physical_ids(call.expert_ids, everything, layout.num_experts)
        counts = _counts_by_source(call, layout)
        rows = call.expand_x[: own_rows(layout, call)]
        if beside is not None:
            rows = add_peer_rows(rows, beside, plan, call)
        returned, position = _return_rows(rows, counts, across, plan, call)
        return rounded_sums(layout, returned, position, call)


def _counts_by_source(call: Combining, layout: Layout) -> torch.Tensor:
    """int64 (L of this rank, W), rows for each local expert by the rank that they return to."""
    own_rows(layout, call)  # raises where the counts are too few
    running = call.ep_send_counts[: layout.ep * layout.local_experts].long()
    counts = running.diff(prepend=running.new_zeros(1))
    if bool((counts < 0).any()):
        at = int((counts < 0).nonzero()[0])
        value, rule = f"{running.tolist()}, which falls at {at}", "must be running sums"
        raise ConstraintError("ep_send_counts", value, rule, "pass the ep_recv_counts that dispatch returned")
    counts = counts.view(layout.local_experts, layout.ep)
    if layout.is_shared:  # what stands as come from ranks of the shared expert is this rank's own (§2.17)
        mine = counts[:, : layout.shared_ranks].sum(dim=1)
        counts = counts.clone()
        counts[:, : layout.shared_ranks] = 0
        counts[:, layout.rank] = mine
    return counts


def _return_rows(
    rows: torch.Tensor, counts: torch.Tensor, part: GroupCall, plan: CombinePlan, call: Combining
) -> tuple[torch.Tensor | Incoming, torch.Tensor]:
    """Rows to the ranks that they came from: what came here, and int64 (Bs, K + Sn), the row of every assignment."""
    layout, packed = plan.layout, call.comm_quant_mode == BLOCK_INT8
    travelling = pack_blocks(rows) if packed else rows
    by_source = torch.arange(layout.ep, device=rows.device).repeat(layout.local_experts)
    source = torch.repeat_interleave(by_source, counts.flatten())
    order, outgoing = prepare_returning(source, layout.ep, travelling.shape[1:], travelling, numbered=False)
    returning = counts.new_zeros((layout.ep, layout.experts_per_rank))
    returning[:, : layout.local_experts] = counts.T
    header, number = plan.headers[False, False], dispatch_number(call, 0)
    returned, incoming = part.send(header, returning, outgoing, travelling, order, dispatch=number)
    first = torch.from_numpy(incoming.first).to(rows.device)
    position = _positions(returned, first, call, layout)
    received = unpack_blocks(incoming.take(), layout.hidden, rows.dtype) if packed else incoming
    return received, position


def _positions(returned: torch.Tensor, first: torch.Tensor, call: Combining, layout: Layout) -> torch.Tensor:
    """int64 (Bs, K + Sn): which of the returned rows is that of every assignment.

    Args:
        returned: int64 (W, L), rows that each rank returned for each of its experts.
        first: int64 (W,), the position of each rank's first row.
    """
    routing, expand_idx = route_v1(call.expert_ids, layout)
    if not torch.equal(returned, routing.counts):
        raise ConstraintError(
            "expert_ids",
            f"such that {int(routing.counts.sum())} rows are due here, while {int(returned.sum())} came, or of others",
            "must be the ids that dispatch was called with",
            "pass the expert_ids and the ep_recv_counts of one dispatch on all ranks",
        )
    # The sum reads at these positions unchecked, so they are looked at whatever check_values says.
    if not torch.equal(call.expand_idx, expand_idx):
        at = int((call.expand_idx != expand_idx).nonzero()[0])
        token, k = divmod(at, layout.top_k)
        value = f"{int(call.expand_idx[at])} for token {token}, k {k}"
        rule = f"must be {int(expand_idx[at])}, the position of that row among those for expert "
        rule += str(int(call.expert_ids[token, k]))
        raise ConstraintError("expand_idx", value, rule, "pass what dispatch returned, unchanged")
    starts = first[:, None] + returned.cumsum(dim=1) - returned
    ids = call.expert_ids.long()
    rank = layout.shared_ranks + torch.div(ids, layout.experts_per_rank, rounding_mode="floor")
    position = starts[rank, ids % layout.experts_per_rank] + expand_idx.view(ids.shape)
    if not layout.shared_ranks:
        return position
    destination, place = shared_places(layout, ids.device)
    return torch.cat([position, (starts[destination, 0] + place)[:, None]], dim=1)


def _fake(call: Combining) -> torch.Tensor:
    return call.expand_x.new_empty((call.expert_ids.shape[0], call.expand_x.shape[1]))


register("combine_v1", CombineV1Call, _run, _fake)
