"""MoeDistributeDispatchV2: send every token to the ranks of its experts (specification §2).

Shapes: Bs tokens, H hidden, K experts per token, W ranks, L experts per MoE rank, N rows received from the expert
parallel group, A capacity in rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from evenmoe.contract.dispatch import check_dispatch
from evenmoe.contract.layout import Layout, scale_down
from evenmoe.contract.limits import resolve_limits
from evenmoe.dispatched import Dispatched
from evenmoe.ops import memory
from evenmoe.ops.exchange import Received, Sending, exchange, prepare_sending
from evenmoe.ops.groups import active_ranks, calls_of, collective, find_groups, in_order
from evenmoe.ops.quantise import quantise_rows, reinterpret
from evenmoe.ops.registration import CHECKS, GROUPS, VIRTUAL, register
from evenmoe.ops.routing import route, sent_entries
from evenmoe.ops.specs import specs_of
from evenmoe.ops.values import check_physical_ids
from evenmoe.transport.agreement import UNKNOWN, digest, dtype_code
from evenmoe.transport.call import GroupCall, Outgoing, together
from evenmoe.transport.process_world import Group

DYNAMIC_INT8 = 2  # quant_mode of §2.8
Zeros = Callable[[torch.Tensor, tuple[int, ...], torch.dtype], torch.Tensor]


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

    On the wire a token crosses once per destination rank, not once per expert; the outputs are the operator's.

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
        expert_scales, performance_info: taken for the signature's sake; unused by this chip.
        elastic_info: int32 (4 + 2·W,), the scaled-down world (§2.11).
        expert_shard_type: 0, shared-expert ranks come first.
        shared_expert_num, shared_expert_rank_num: shared experts, and the ranks 0… that host them.
        quant_mode: 0 to send rows as they are, 2 for int8 with one scale per row.
        global_bs: 0, or W · (the largest Bs of any rank) when ranks have different numbers of tokens.
        expert_token_nums_type: 1 for counts, 0 for prefix sums.
        comm_alg: "", "fullmesh_v1" or "fullmesh_v2"; the outputs are the same.
        zero_expert_num, copy_expert_num, const_expert_num: virtual experts.
        check_values: refuse ids out of range or repeated within a token. False saves the pass.
        limits: "atlas-a3" for exactly the chip's ranges, "relaxed" for its maxima with small worlds allowed, or
            "unlimited".

    Returns:
        `Dispatched`, the seven outputs; unwritten regions are zero.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §2.13.
        RankDisagreementError: the ranks' calls or sizes differ, or the call was refused or failed on another rank; the
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
    with collective(locals(), "dispatch", "dispatch", x) as arguments:
        *outputs, number = torch.ops.evenmoe.dispatch(**arguments)
        return Dispatched(*outputs, num_experts=num_experts, number=number)


def _run(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    ep, tp = find_groups(given)
    x, scaled_down = given["x"], given["elastic_info"] is not None
    across, beside = calls_of("dispatch", ep, tp, scaled_down, x)
    with together(*in_order("dispatch", across, beside)):
        layout = _layout(given)
        if scaled_down:
            layout = scale_down(layout, given["elastic_info"].tolist(), smooth_scales=given["scales"] is not None)
            across.narrow(active_ranks(ep, layout))
        if given["check_values"]:
            _check_values(given["expert_ids"], layout, given)
        number = torch.tensor([across.group.number(), UNKNOWN if beside is None else beside.group.number()])
        outputs, received = _exchange_across(across, layout, given, stay=tp is None)
        peer = None if beside is None else _exchange_with_peer(received, beside, layout)
        return (*_fill(outputs, x, received, peer, given), number)


def _exchange_across(
    call: GroupCall, layout: Layout, given: dict[str, Any], stay: bool
) -> tuple[tuple[torch.Tensor, ...], Received]:
    """The exchange of the expert-parallel group; the outputs, of which expand_x may be filled already.

    Args:
        stay: what is received is not handed on to a peer, who would read it while the caller writes to it.
    """
    x, quantised = given["x"], given["quant_mode"] == DYNAMIC_INT8
    shape = (layout.hidden + 4,) if quantised else (layout.hidden,)  # H int8 and one float32 scale, as bytes
    sending = prepare_sending(
        route(given["expert_ids"], layout, given["x_active_mask"]),
        x.shape[0],
        shape,
        x.new_empty(0, dtype=torch.uint8) if quantised else x,
        rows_differ_by_expert=given["scales"] is not None,
    )
    counts = call.agree(_sizes(x, layout, given), sending.routing_counts, sending.outgoing)
    # A shared-expert rank has one local expert, and every source counts for it in column 0.
    counts = counts[:, : layout.local_experts]
    outputs = _allocate(x, layout, given, _zeros)
    rows, index = (_quantised_rows(sending, given), None) if quantised else (x, sending.token)
    # The rows go where they stay, unless their scales come beside them.
    allocate = (lambda n: outputs[0][:n]) if stay and not quantised else None
    return outputs, exchange(call, sending, counts, rows, index, allocate)


def _fake(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    number = torch.empty((2,), dtype=torch.int64)
    return (*_allocate(given["x"], _layout(given), given, _fake_zeros), number)


def _layout(given: dict[str, Any]) -> Layout:
    arguments = {name: value for name, value in given.items() if name not in ("check_values", "limits")}
    return check_dispatch(**specs_of(arguments), limits=resolve_limits(given["limits"]))


def _check_values(expert_ids: torch.Tensor, layout: Layout, given: dict[str, Any]) -> None:
    virtual = given["zero_expert_num"] + given["copy_expert_num"] + given["const_expert_num"]
    sent = sent_entries(expert_ids, layout, given["x_active_mask"])
    check_physical_ids(expert_ids, sent, layout.num_experts + virtual, layout.num_experts)


def _sizes(x: torch.Tensor, layout: Layout, given: dict[str, Any]) -> dict[str, int]:
    return {
        "hidden size of `x`": layout.hidden,
        "dtype of `x`": dtype_code(x.dtype),
        "top-k of `expert_ids`": layout.top_k,
        "`num_experts`": given["moe_expert_num"],
        "`shared_expert_num`": layout.shared_experts,
        "`shared_expert_rank_num`": layout.shared_ranks,
        "`quant_mode`": given["quant_mode"],
        "tokens per rank times ranks (`global_bs`)": layout.global_bs,
        "`zero_expert_num`": given["zero_expert_num"],
        "`copy_expert_num`": given["copy_expert_num"],
        "`const_expert_num`": given["const_expert_num"],
        "presence of `scales`": given["scales"] is not None,
        "presence of `x_active_mask`": given["x_active_mask"] is not None,
        "tensor-parallel world size": given["tp_world_size"],
        "digest of `elastic_info`": digest((layout.num_experts, *layout.survivors)),
    }


def _quantised_rows(sending: Sending, given: dict[str, Any]) -> torch.Tensor:
    """Rows as they travel under quant_mode 2: bytes, H int8 and one float32 scale."""
    rows = given["x"].index_select(0, sending.token)
    smooth = None if given["scales"] is None else given["scales"].index_select(0, sending.expert)
    quantised, scale = quantise_rows(rows, smooth)
    return torch.cat([quantised.view(torch.uint8), reinterpret(scale[:, None], torch.uint8)], dim=1)


@dataclass(frozen=True)
class _Peer:
    """What the tensor-parallel peer holds: its rows (n, …) as they travelled, its counts int64 (ep,)."""

    rows: torch.Tensor
    ep_counts: torch.Tensor


def _exchange_with_peer(received: Received, call: GroupCall, layout: Layout) -> _Peer:
    """§2.12: after the expert-parallel exchange each peer gives the other all of its rows."""
    rows = received.rows
    sizes = {
        "hidden size of `x`": layout.hidden,
        "dtype of the rows": dtype_code(rows.dtype),
        "tokens per rank times ranks (`global_bs`)": layout.global_bs,
        "expert parallel rank": layout.rank,
    }
    peer = 1 - call.group.rank
    mine = received.counts[:, 0]  # a world with two peers has one expert per rank
    to_each = [0, 0]
    to_each[peer] = len(rows)
    theirs = call.agree(sizes, mine.expand(2, -1), Outgoing([0, 0], to_each, rows.shape[1:], rows))[peer]
    incoming = call.exchange(rows)
    first = incoming.first[peer]
    # A copy, since the group uses its memory again.
    return _Peer(incoming.buffer[first : first + incoming.rows[peer]].clone(), theirs)


def _allocate(x: torch.Tensor, layout: Layout, given: dict[str, Any], zeros: Zeros) -> tuple[torch.Tensor, ...]:
    dtype = torch.int8 if given["quant_mode"] == DYNAMIC_INT8 else x.dtype
    return (
        zeros(x, (layout.expand_x_rows, x.shape[1]), dtype),
        zeros(x, (layout.dynamic_scales_length,), torch.float32),
        zeros(x, (layout.assist_info_length,), torch.int32),
        zeros(x, (layout.expert_token_nums_length,), torch.int64),
        zeros(x, (layout.ep_recv_counts_length,), torch.int32),
        zeros(x, (layout.tp_recv_counts_length,), torch.int32),
        zeros(x, (layout.expand_scales_length,), torch.float32),
    )


def _fake_zeros(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return x.new_zeros(shape, dtype=dtype)


def _zeros(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return memory.zeros(shape, dtype, x.device)  # of A rows few are ever received, and only they are written


def _fill(
    outputs: tuple[torch.Tensor, ...], x: torch.Tensor, received: Received, peer: _Peer | None, given: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    expand_x, dynamic_scales, assist, token_nums, ep_recv_counts, tp_recv_counts, _ = outputs
    own = len(received.rows)
    rows = received.rows if peer is None else torch.cat([received.rows, peer.rows])
    if given["quant_mode"] == DYNAMIC_INT8:
        hidden = x.shape[1]
        dynamic_scales[: len(rows)] = reinterpret(rows[:, hidden:], torch.float32)[:, 0]
        rows = rows[:, :hidden].view(torch.int8)
    if given["quant_mode"] == DYNAMIC_INT8 or peer is not None:  # else they were gathered where they stay
        expand_x[: len(rows)] = rows
    assist[: 3 * own] = torch.stack([received.source, received.token, received.k], dim=1).flatten()
    ordered = received.counts.T.flatten()  # (local expert, source rank)
    ep_recv_counts[: len(ordered)] = ordered.cumsum(0)
    per_expert = received.counts.sum(dim=0)
    if peer is not None:
        ep_recv_counts[len(ordered) : 2 * len(ordered)] = peer.ep_counts.cumsum(0)
        per_expert = per_expert + len(peer.rows)
        tp_recv_counts[given["tp_rank_id"]] = own
        tp_recv_counts[1 - given["tp_rank_id"]] = len(peer.rows)
    token_nums[: len(per_expert)] = per_expert if given["expert_token_nums_type"] == 1 else per_expert.cumsum(0)
    return outputs


register(
    "dispatch",
    required=("x", "expert_ids"),
    optional=("scales", "x_active_mask", "expert_scales", "elastic_info", "performance_info"),
    attributes={  # in the operator's order (§2.1)
        **GROUPS,
        "expert_shard_type": "int",
        "shared_expert_num": "int",
        "shared_expert_rank_num": "int",
        "quant_mode": "int",
        "global_bs": "int",
        "expert_token_nums_type": "int",
        "comm_alg": "str",
        **VIRTUAL,
        **CHECKS,
    },
    outputs=8,  # the operator's seven, and which exchange of each group it was
    run=_run,
    fake=_fake,
)
