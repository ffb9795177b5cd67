"""MoeDistributeCombineV2: return the experts' rows to their tokens and add them up (specification §3).

Shapes: Bs tokens, H hidden, K experts per token, Sn shared experts on ranks of their own, W ranks, N rows of this rank.
A token has K + Sn assignments: k for its k-th expert, K + e for shared expert e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch

from evenmoe.contract.calls import CombineCall
from evenmoe.contract.combine import check_combine_call
from evenmoe.contract.layout import Layout, scale_down
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.dispatched import Dispatched
from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import active_tokens, check_physical_ids, positions_of, prepare_returning, sent_assignments
from evenmoe.ops.gradients import as_recorded, check_differentiable, needed, not_recorded, record_combine
from evenmoe.ops.numerics import BLOCK_INT8, pack_blocks, unpack_blocks
from evenmoe.ops.operator import (
    Combining,
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
)
from evenmoe.ops.weighted_sum import accumulate, rounded_sums
from evenmoe.transport.agreement import (
    GRADIENTS_OF_ROWS,
    GRADIENTS_OF_SCALES,
    NEEDED,
    OFF,
    UNKNOWN,
    Header,
    dtype_code,
)
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Incoming, Outgoing
from evenmoe.transport.process_world import Group

_Call = TypeVar("_Call", bound=CombineCall[torch.Tensor])


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
    `shared_expert_x`, both unweighted; one rounding to the output dtype (§3.4). The result is differentiable in
    `expert_out`, `expert_scales` and `shared_expert_x`, where dispatch is in x and rows do not return as int8.

    Args:
        expert_out: float16, bfloat16 (or float32, beyond the chip) (A·max(tp, 1), H), the experts' outputs in the row
            order of `dispatched.expand_x`.
        expert_ids: int32 (Bs, K), the physical ids that dispatch was called with.
        dispatched: what dispatch returned.
        expert_scales: float32 (Bs, K), gate weights.
        num_experts: M; None for that of the dispatch.
        ep, tp, group, x_active_mask, elastic_info, expert_shard_type: as in dispatch.
        shared_expert_num, shared_expert_rank_num, global_bs: as in dispatch.
        zero_expert_num, copy_expert_num, const_expert_num: as in dispatch.
        activation_scale, weight_scale, group_list, expand_scales, performance_info: None on this chip.
        shared_expert_x: (Bs, H) or (a, b, H) with a·b = Bs, dtype of expert_out, added to the sum; only without ranks
            for shared experts.
        ori_x: (Bs, H), dtype of expert_out, the tokens themselves, for copy and const experts.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: (const_expert_num, H), dtype of expert_out. Const
            expert j gives p1·x + p2·v[j], where p = softmax(Σ alpha_1[j]·x, Σ alpha_2[j]·x).
        comm_quant_mode: 0, or 2 to send int8 with one scale per eight elements.
        out_dtype, group_list_type, comm_alg: not looked at.
        check_values: check that ids, assist info and counts belong to the dispatch. False saves the passes.
        limits: as in dispatch.

    Returns:
        (Bs, H), dtype of expert_out; rows of inactive tokens are zero.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §3.6.
        RankDisagreementError: the ranks combine different dispatches or call with different sizes, or the call was
            invalid or failed on another rank; the same on every rank. The next call that all ranks make is right.
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
    given = locals()
    with combining(CombineCall, given) as call:
        recorded = needed(expert_out, expert_scales, shared_expert_x, getattr(dispatched, "link", None))
        if recorded:
            check_differentiable(call)
            call = as_recorded(call, dispatched)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not recorded):
            y = perform("combine", call if recorded else not_recorded(call))
    return record_combine(y, given) if recorded else y


@contextmanager
def combining(call_type: Callable[..., _Call], given: dict[str, Any]) -> Iterator[_Call]:
    """The call that a public function makes of its arguments, and performs inside."""
    arguments = dict(given)
    rows = arguments["expand_x"] = arguments.pop("expert_out")
    dispatched: Dispatched | None = arguments.pop("dispatched")
    # What is missing here is None there, and raised for like any other argument.
    arguments["assist_info_for_combine"] = getattr(dispatched, "assist_info_for_combine", None)
    arguments["ep_send_counts"] = getattr(dispatched, "ep_recv_counts", None)
    arguments["tp_send_counts"] = getattr(dispatched, "tp_recv_counts", None)
    if arguments["num_experts"] is None:
        arguments["num_experts"] = getattr(dispatched, "num_experts", None) or None
    arguments["dispatch_number"] = getattr(dispatched, "number", None)
    with collective("combine", call_type, arguments, rows) as call:
        yield call


@dataclass(frozen=True)
class CombinePlan:
    """What follows from a call's shapes and attributes: the layout, and what the ranks and the peers must agree on."""

    layout: Layout
    headers: dict[tuple[bool, bool], Header]  # by whether gradients are recorded of the rows, and of the weights
    peer_header: Header


def make_plan(
    call: CombineCall[TensorSpec],
    layout: Layout,
    elastic_info: tuple[int, ...] | None = None,
    operator: str = "combine",
) -> CombinePlan:
    """The plan of a checked call, in the world that `elastic_info` leaves; `operator` is the name to agree under."""
    if elastic_info is not None:
        layout = scale_down(layout, elastic_info)
    sizes = common_sizes(call, layout) | {
        "hidden size of `expert_out`": layout.hidden,
        "dtype of `expert_out`": dtype_code(call.expand_x.dtype),
        "`comm_quant_mode`": call.comm_quant_mode,
    }
    peer_sizes = {**sizes, "expert parallel rank": layout.rank}
    headers = {}
    for rows, weights in product((False, True), repeat=2):
        states = {GRADIENTS_OF_ROWS: NEEDED if rows else OFF, GRADIENTS_OF_SCALES: NEEDED if weights else OFF}
        headers[rows, weights] = Header(operator, sizes | (states if operator == "combine" else {}))
    return CombinePlan(layout, headers, Header("tensor-parallel step of combine", peer_sizes))


def combine_and_sum(
    call: Combining,
    prepared: Prepared[Layout, CombinePlan],
    add_up: Callable[[Layout, torch.Tensor | Incoming, torch.Tensor, Combining], torch.Tensor] = accumulate,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the call, exchange its rows and add them up.

    Args:
        prepared: the contract of the operator, and what was made of earlier calls.
        add_up: layout, rows, position, call -> (Bs, H), the sums; `accumulate` for those before the final rounding.

    Returns:
        (Bs, H), the sums; bool (Bs,), active tokens, whose sums count.
    """
    ep, tp = find_groups(call)
    scaled_down = call.elastic_info is not None
    across, beside = parts_of("combine", ep, tp, scaled_down, call.expand_x)
    with together(*in_order("combine", across, beside)):
        plan = prepared(call, elastic_values(call))
        if scaled_down:
            across.narrow(active_ranks(ep, plan.layout))
        layout = plan.layout
        sent = sent_assignments(call.expert_ids, layout, call.x_active_mask)
        if call.check_values:
            check_physical_ids(call.expert_ids, sent, layout.num_experts + call.virtual_experts)
        active = active_tokens(layout.num_tokens, call.x_active_mask, sent.device)
        due = torch.cat([sent, active[:, None].expand(-1, layout.shared_experts)], dim=1)  # rows that must return
        num_rows = own_rows(layout, call)
        assist_info = call.assist_info_for_combine[: 3 * num_rows].reshape(num_rows, 3).long()
        if call.check_values:
            _check_assist_info(assist_info, layout)
        rows = call.expand_x[:num_rows]
        if beside is not None:
            rows = add_peer_rows(rows, beside, plan, call)
        returned, position = _return_rows(rows, assist_info, across, plan, call, due)
        return add_up(layout, returned, position, call), active


def own_rows(layout: Layout, call: Combining) -> int:
    """The last of this rank's own prefix sums (§3.3)."""
    last = layout.ep * layout.local_experts - 1
    if last >= len(call.ep_send_counts):  # which the chip's own check lets through without TP (§3.2)
        raise ConstraintError(
            "ep_send_counts",
            f"of length {len(call.ep_send_counts)}",
            f"must hold {last + 1} counts, one per local expert and source rank",
            "pass the ep_recv_counts that dispatch returned",
        )
    num_rows = int(call.ep_send_counts[last])
    if not 0 <= num_rows <= min(layout.capacity, len(call.expand_x)):
        raise ConstraintError(
            "ep_send_counts",
            f"{num_rows} at {last}",
            f"must count 0 to {min(layout.capacity, len(call.expand_x))} rows of this rank",
            "pass the ep_recv_counts that dispatch returned",
        )
    return num_rows


def _check_assist_info(assist_info: torch.Tensor, layout: Layout) -> None:
    """Ranks of the world, and assignments that some rank can have; whether they are right, that rank checks."""
    source, token, k = assist_info.unbind(dim=1)
    each = layout.top_k + layout.shared_experts
    wrong = (source < 0) | (source >= layout.ep) | (token < 0) | (token >= layout.max_bs) | (k < 0) | (k >= each)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ConstraintError(
            "assist_info_for_combine",
            f"{assist_info[row].tolist()} for row {row}",
            f"must be (rank below {layout.ep}, token below {layout.max_bs}, k below {each})",
            "pass what dispatch returned, unchanged",
        )


def add_peer_rows(rows: torch.Tensor, part: GroupCall, plan: CombinePlan, call: Combining) -> torch.Tensor:
    """§3.3: own row i plus the peer's row for the same token, which is the peer's row n_peer + i."""
    expand_x, tp_send_counts, peer, own = call.expand_x, call.tp_send_counts, 1 - part.group.rank, len(rows)
    assert tp_send_counts is not None
    theirs = int(tp_send_counts[peer])
    # What each hands over and what each holds, so that both peers raise for what one of them got wrong.
    mine = torch.tensor([[theirs, own]] * 2, device=expand_x.device)
    offer = expand_x[own : own + theirs]
    to_each = [0, 0]
    to_each[peer] = len(offer)
    outgoing = Outgoing([0, 0], to_each, rows.shape[1:], rows)
    offered, held = part.agree(plan.peer_header, mine, outgoing, dispatch_number(call, 1))[peer].tolist()
    if offered != own or theirs != held:
        raise ConstraintError(
            "tp_send_counts",
            f"{tp_send_counts.tolist()} with {own} rows of this rank, {held} of its peer and {offered} offered by it",
            "must count the rows of both peers, own first in expert_out",
            "pass the tp_recv_counts and ep_recv_counts that dispatch returned on both peers",
        )
    incoming = part.exchange(offer)
    received = incoming.take()[incoming.first[peer] :][:own]
    # float16 too: a sum of two float16 in float32, rounded once more, is the sum rounded once (24 ≥ 2·11 + 2 bits).
    return (rows.float() + received.float()).to(rows.dtype)


def _return_rows(
    rows: torch.Tensor,
    assist_info: torch.Tensor,
    part: GroupCall,
    plan: CombinePlan,
    call: Combining,
    due: torch.Tensor,
) -> tuple[torch.Tensor | Incoming, torch.Tensor]:
    """Rows to the ranks in their assist info.

    Returns:
        rows (N, H) received, in the dtype of expand_x, valid until the call ends; int64 (Bs, K + Sn), the row of every
        assignment, −1 where none is `due`.
    """
    layout, world_size, packed = plan.layout, part.group.world_size, call.comm_quant_mode == BLOCK_INT8
    source, token, k = assist_info.unbind(dim=1)
    travelling = pack_blocks(rows) if packed else rows
    order, outgoing = prepare_returning(source, world_size, travelling.shape[1:], travelling, numbered=True)
    nothing = torch.zeros((world_size, 0), dtype=torch.int64)
    header = plan.headers[call.expand_x.requires_grad, call.expert_scales.requires_grad]
    each = layout.top_k + layout.shared_experts
    sent = (token * each + k)[order].int()
    if travelling.requires_grad:
        travelling = travelling.detach()
    _, incoming = part.send(header, nothing, outgoing, travelling, order, sent, dispatch_number(call, 0))
    assignments = incoming.numbers.long()
    if call.check_values:
        _check_returned(assignments, due.flatten())
    position = positions_of(incoming, assignments, due.numel()).view(due.shape)
    received = unpack_blocks(incoming.take(), layout.hidden, rows.dtype) if packed else incoming
    return received, torch.where(due, position, -1)


def _check_returned(assignments: torch.Tensor, due: torch.Tensor) -> None:
    """Exactly one row has returned for every assignment that was sent out; `due` is bool (Bs·(K + Sn),)."""
    in_range = bool(((assignments >= 0) & (assignments < due.numel())).all())
    received = torch.bincount(assignments, minlength=due.numel()) if in_range else assignments
    if not in_range or not torch.equal(received, due.long()):
        raise ConstraintError(
            "expert_ids",
            f"such that {int(due.sum())} rows are due here, while {len(assignments)} came, not one for each",
            "must be the ids that dispatch was called with, with the same mask",
            "pass the expert_ids, x_active_mask and assist_info_for_combine of one dispatch",
        )


def dispatch_number(call: Combining, group: int) -> int:
    """Which exchange of a group the dispatch was: 0 is the expert-parallel group, 1 that of the peers."""
    return UNKNOWN if call.dispatch_number is None else int(call.dispatch_number[group])


PREPARED = Prepared("combine", check_combine_call, make_plan)


def _run(call: Combining) -> torch.Tensor:
    y, active = combine_and_sum(call, PREPARED, rounded_sums)
    if call.shared_expert_x is None and not call.virtual_experts:
        return y  # an inactive token has no rows, so its sum is zero
    return torch.where(active[:, None], y, 0.0)


def _fake(call: Combining) -> torch.Tensor:
    return call.expand_x.new_empty((call.expert_ids.shape[0], call.expand_x.shape[1]))


register("combine", CombineCall, _run, _fake)
