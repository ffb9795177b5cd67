"""MoeDistributeDispatch, the first version: rows as in V2 but for the shared expert's, and no assist info (§2.17).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, Sr of them for the shared expert, L experts per MoE rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from evenmoe.contract.calls import DispatchV1Call
from evenmoe.contract.first_version import check_dispatch_v1_call, infer_dispatch_v1
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.ops.dispatch import DispatchPlan, exchange_across, exchange_with_peer, fill
from evenmoe.ops.exchange import Routing, check_physical_ids, route
from evenmoe.ops.operator import Prepared, common_sizes, find_groups, in_order, parts_of, register, specs_of
from evenmoe.transport.agreement import UNKNOWN, Header, dtype_code
from evenmoe.transport.call import together


def route_v1(expert_ids: torch.Tensor, layout: Layout) -> tuple[Routing, torch.Tensor]:
    """Lay out what this rank sends.

    Args:
        expert_ids: integers (Bs, K), physical ids.

    Returns:
        The routing; and int32 (Bs·K,), expand_idx: which of the rows that this rank sends to its expert each is.

    Three tokens of which two ask for expert 1:

    >>> from evenmoe.contract.layout import make_layout
    >>> layout = make_layout(ep=2, rank=0, num_experts=2, num_tokens=3, hidden=1, top_k=1)
    >>> route_v1(torch.tensor([[1], [0], [1]]), layout)[1].tolist()
    [0, 0, 1]
    """
    moe = route(expert_ids, replace(layout, shared_experts=0, ranks_per_shared=1))
    per_expert = moe.counts.flatten()
    first = torch.repeat_interleave(per_expert.cumsum(0) - per_expert, per_expert)
    expand_idx = torch.zeros(expert_ids.numel(), dtype=torch.int32, device=expert_ids.device)
    position = torch.arange(len(first), device=expert_ids.device) - first
    expand_idx[moe.token * layout.top_k + moe.k] = position.int()
    if not layout.shared_ranks:
        return moe, expand_idx
    destination, _ = shared_places(layout, expert_ids.device)
    token = torch.arange(layout.num_tokens, device=expert_ids.device)
    counts = moe.counts.clone()
    counts[: layout.shared_ranks, 0] = torch.bincount(destination, minlength=layout.shared_ranks)
    shared = torch.zeros_like(token)
    routing = Routing(
        torch.cat([token, moe.token]),
        torch.cat([shared + layout.top_k, moe.k]),
        torch.cat([shared, moe.expert + 1]),
        counts,
    )
    return routing, expand_idx


def shared_places(layout: Layout, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token's row for the shared expert goes: int64 (Bs,) its rank, and which of the rows sent there it is.

    A rank of the shared expert keeps its own tokens. Another rank divides its tokens among those ranks, beginning with
    a shorter or a longer part by its number, so that each of them gets as many (§2.17).
    """
    token = torch.arange(layout.num_tokens, device=device)
    if layout.is_shared:
        return torch.full_like(token, layout.rank), token
    starts = torch.tensor(shared_starts(layout), device=device)
    destination = torch.searchsorted(starts[1:], token, right=True)
    return destination, token - starts[destination]


def shared_starts(layout: Layout) -> list[int]:
    """The first token of each part when a rank's tokens are divided among the ranks of the shared expert, and Bs.

    >>> from evenmoe.contract.layout import make_layout
    >>> world = {"ep": 4, "num_experts": 2, "num_tokens": 3, "hidden": 1, "top_k": 1, "shared_ranks": 2}
    >>> [shared_starts(make_layout(rank=rank, **world)) for rank in (2, 3)]
    [[0, 1, 3], [0, 2, 3]]
    """
    tokens, ranks = layout.num_tokens, layout.shared_ranks
    before = layout.rank * tokens // ranks
    return [(rank + layout.rank) * tokens // ranks - before for rank in range(ranks + 1)]


def counted(counts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """int64 (W, L), received rows as ep_recv_counts has them: a rank of the shared expert divides its own tokens among
    all such ranks, as if they had come from there."""
    if not layout.is_shared:
        return counts
    starts = torch.tensor(shared_starts(layout), device=counts.device)
    shown = counts.clone()
    shown[: layout.shared_ranks, 0] = starts.diff()
    return shown


def make_plan(call: DispatchV1Call[TensorSpec], layout: Layout, _: object = None) -> DispatchPlan:
    """The plan of a checked call."""
    sizes = common_sizes(replace(call, x_active_mask=None), layout) | {
        "hidden size of `x`": layout.hidden,
        "dtype of `x`": dtype_code(call.x.dtype),
        "`quant_mode`": call.quant_mode,
        "presence of `scales`": call.scales is not None,
        "presence of `expert_scales`": False,  # which are not sent
    }
    outputs = infer_dispatch_v1(layout, call.x.dtype, call.quant_mode).values()
    return DispatchPlan(
        layout, Header("dispatch_v1", sizes), [(spec.shape, getattr(torch, spec.dtype)) for spec in outputs]
    )


PREPARED = Prepared("dispatch_v1", check_dispatch_v1_call, make_plan)


def _run(call: DispatchV1Call[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    ep, tp = find_groups(call)
    across, beside = parts_of("dispatch_v1", ep, tp, False, call.x)
    with together(*in_order("dispatch_v1", across, beside)):
        plan = PREPARED(call)
        layout = plan.layout
        if call.check_values:
            everything = torch.ones_like(call.expert_ids, dtype=torch.bool)
            check_physical_ids(call.expert_ids, everything, layout.num_experts)
        number = torch.tensor([across.number, UNKNOWN if beside is None else beside.number])
        routing, expand_idx = route_v1(call.expert_ids, layout)
        unweighted = replace(call, expert_scales=None)
        outputs, received = exchange_across(across, plan, unweighted, routing, local=tp is None)
        received = replace(received, counts=counted(received.counts, layout))
        peer = None if beside is None else exchange_with_peer(received, beside, layout)
        fill(outputs, received, peer, unweighted)
        outputs[2][:] = expand_idx
        return (*outputs, number)


def _fake(call: DispatchV1Call[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    specs = specs_of(call)
    outputs = infer_dispatch_v1(check_dispatch_v1_call(specs), specs.x.dtype, call.quant_mode).values()
    number = torch.empty((2,), dtype=torch.int64)
    return (*[call.x.new_zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in outputs], number)


register("dispatch_v1", DispatchV1Call, _run, _fake)
