"""MoeDistributeDispatchV2 over the whole world: tokens to the ranks of their experts (§2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from evenmoe.dispatched import Dispatched
from evenmoe.reference.numerics import quantize_token
from evenmoe.reference.world import Layout, World, active_entries, ceil_div, make_world, one_per_rank


def dispatch(
    x: Sequence[torch.Tensor | None],
    expert_ids: Sequence[torch.Tensor | None],
    *,
    num_experts: int,
    tp_world_size: int = 0,
    scales: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    x_active_mask: Sequence[torch.Tensor | None] | None = None,
    expert_scales: Sequence[torch.Tensor | None] | None = None,
    elastic_info: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> list[Dispatched | None]:
    """Send every token to the ranks of its experts.

    Args:
        x: per rank (Bs,H) bfloat16, float16 or float32 (the chip has no float32); None on a rank that is gone.
        expert_ids: per rank int (Bs,K), physical MoE experts 0…M−1, then zero, copy and const experts (not sent).
        num_experts: M, physical MoE experts.
        tp_world_size: 0 or 1: no TP exchange; 2: TP peers exchange what they received.
        scales: float32 (Sn+M,H) smoothing factors for quant_mode 2, one tensor or one per rank, or None. Row e belongs
            to shared expert e, row Sn+m to MoE expert m.
        x_active_mask: per rank bool (Bs,) (its number of True tokens take part) or (Bs,K) (entry by entry), or None.
        expert_scales: per rank float32 (Bs,K), whose entry for each row arrives in expand_scales, or None.
        elastic_info: int32 (4+2·ep,), one tensor or one per rank, or None (§2.11).
        shared_expert_num, shared_expert_rank_num: Sn, Sr; the pair (1, 0) means no shared experts.
        quant_mode: 0 copies rows, 2 quantises them to int8.
        global_bs: 0, or ep times the largest Bs of any rank.
        expert_token_nums_type: 1 counts, 0 inclusive prefix sums.
        zero_expert_num, copy_expert_num, const_expert_num: virtual experts behind the physical ones.

    Returns:
        Per rank a `Dispatched`, allocated as §5 says, zero where the operator writes nothing; None where x is None.

    Source: §2. Two ranks with one expert each; rank 1's token goes to both:

    >>> x = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    >>> ids = [torch.tensor([[1, 2]]), torch.tensor([[1, 0]])]  # id 2 is a zero expert: nobody gets it
    >>> one, two = dispatch(x, ids, num_experts=2, zero_expert_num=1)
    >>> one.expand_x.tolist(), one.ep_recv_counts.tolist()
    ([[3.0, 4.0], [0.0, 0.0]], [0, 1])
    >>> two.expand_x.tolist(), two.ep_recv_counts.tolist()
    ([[1.0, 2.0], [3.0, 4.0]], [1, 2])
    >>> two.assist_info_for_combine[:6].tolist()  # (rank 0, token 0, k 0), (rank 1, token 0, k 0)
    [0, 0, 0, 1, 0, 0]
    """
    world = make_world(
        len(x),
        tp_world_size=tp_world_size,
        num_experts=num_experts,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        elastic_info=elastic_info,
    )
    num_ids = world.current.experts + zero_expert_num + copy_expert_num + const_expert_num
    tokens, ids = one_per_rank(x, len(x)), one_per_rank(expert_ids, len(x))
    masks, smooth = one_per_rank(x_active_mask, len(x)), one_per_rank(scales, len(x))
    weights = one_per_rank(expert_scales, len(x))

    outboxes: dict[tuple[int, int], _Outbox] = {}
    for rank, tp_rank in world.ranks():
        d = world.index(rank, tp_rank)
        assert all(0 <= expert < num_ids for expert in ids[d].flatten().tolist())
        given = weights[d] if tp_world_size < 2 else None  # the release with peers sends none
        outboxes[rank, tp_rank] = _pack(world, rank, tokens[d], ids[d], masks[d], smooth[d], given, quant_mode)
    # EP first, then TP (§2.12)
    received = {(rank, tp_rank): _receive(world, rank, tp_rank, outboxes) for rank, tp_rank in world.ranks()}

    results: list[Dispatched | None] = [None] * len(x)
    for rank, tp_rank in world.ranks():
        d = world.index(rank, tp_rank)
        own = received[rank, tp_rank]
        peer = received[rank, 1 - tp_rank] if world.tp == 2 else None
        size = _Size(world, rank, tokens[d].shape[1], ids[d], global_bs)
        dtype = torch.int8 if quant_mode == 2 else tokens[d].dtype
        results[d] = _write(size, own, peer, tp_rank, dtype, expert_token_nums_type)
    return results


@dataclass(frozen=True)
class _Sent:
    """One row on its way: (token, k) on its source, its scale when quantised, and its weight, 0 where there is none."""

    token: int
    k: int
    row: torch.Tensor
    dynamic_scale: torch.Tensor | None
    weight: torch.Tensor | float


_Outbox = dict[tuple[int, int], list[_Sent]]  # (rank, local expert) -> rows in the order of (token, k)


@dataclass
class _Received:
    """What one rank got over EP, in the order of local expert, source rank, token (§2.5)."""

    rows: list[torch.Tensor] = field(default_factory=list)
    dynamic_scales: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor | float] = field(default_factory=list)
    assist_info: list[int] = field(default_factory=list)
    num_per_local: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)  # rows so far, after every (local expert, source rank)


def _pack(
    world: World,
    source: int,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    mask: torch.Tensor | None,
    smooth: torch.Tensor | None,
    expert_scales: torch.Tensor | None,
    quant_mode: int,
) -> _Outbox:
    """What `source` sends, by destination (§2.5, §2.6, §2.9, §2.10)."""
    layout = world.current
    first_moe_scale = world.original.shared_experts  # the rows of `scales` are numbered by the caller's Sn
    outbox: _Outbox = {}

    def send(destination: tuple[int, int], token: int, k: int, scale_row: int) -> None:
        row, dynamic_scale = x[token], None
        if quant_mode == 2:
            row, dynamic_scale = quantize_token(row, None if smooth is None else smooth[scale_row])
        weight = 0.0 if expert_scales is None or k >= top_k else expert_scales[token, k]
        outbox.setdefault(destination, []).append(_Sent(token, k, row, dynamic_scale, weight))

    num_tokens, top_k = expert_ids.shape
    active = active_entries(mask, num_tokens, top_k)
    for token in range(num_tokens):
        for k in range(top_k):
            expert = int(expert_ids[token, k])
            if active[token][k] and expert < layout.experts:
                send(layout.home(expert), token, k, first_moe_scale + expert)
        if any(active[token]):
            for e in range(layout.shared_experts):
                send((layout.shared_home(e, source), 0), token, top_k + e, e)
    return outbox


def _receive(world: World, rank: int, tp_rank: int, outboxes: dict[tuple[int, int], _Outbox]) -> _Received:
    """Concatenate what all EP ranks (of the same TP rank) sent to `rank` (§2.5, §2.7)."""
    layout = world.current
    received = _Received()
    for local in range(layout.num_local(rank)):
        before = len(received.rows)
        for source in range(layout.ep):
            for sent in outboxes[source, tp_rank].get((rank, local), []):
                received.rows.append(sent.row)
                received.assist_info.extend((source, sent.token, sent.k))
                received.weights.append(sent.weight)
                if sent.dynamic_scale is not None:
                    received.dynamic_scales.append(sent.dynamic_scale)
            received.running.append(len(received.rows))
        received.num_per_local.append(len(received.rows) - before)
    return received


class _Size:
    """The allocated sizes of one rank (§2.4, §5), all from the caller's original values (§2.11)."""

    def __init__(self, world: World, rank: int, hidden: int, expert_ids: torch.Tensor, global_bs: int) -> None:
        layout, rank = world.original, world.original_rank[rank]
        num_tokens, top_k = expert_ids.shape
        self.hidden, self.tp = hidden, world.tp
        self.capacity = _capacity(layout, rank, top_k, global_bs or num_tokens * layout.ep, either_kind=world.elastic)
        self.num_local = layout.num_local(rank)
        self.assist = max(num_tokens * top_k, 128 * self.capacity)
        self.ep_recv = layout.ep * self.num_local * (2 if world.tp == 2 else 1)


def _capacity(layout: Layout, rank: int, top_k: int, global_bs: int, *, either_kind: bool) -> int:
    """A of §2.4, in rows; the larger one of both kinds of rank where they may change sides."""
    moe = global_bs * min(layout.experts_per_rank, top_k)
    shared = 0
    if layout.shared_ranks:
        shared = global_bs // layout.ep * ceil_div(layout.ep, layout.ranks_per_shared_expert)
    if either_kind:
        return max(moe, shared)
    return shared if layout.is_shared(rank) else moe


def _write(
    size: _Size, own: _Received, peer: _Received | None, tp_rank: int, dtype: torch.dtype, expert_token_nums_type: int
) -> Dispatched:
    """Lay out the seven outputs; own rows first, then the peer's (§2.7, §2.12)."""
    capacity, copies = size.capacity, max(size.tp, 1)
    assert len(own.rows) <= capacity
    result = Dispatched(
        expand_x=torch.zeros((capacity * copies, size.hidden), dtype=dtype),
        dynamic_scales=torch.zeros(capacity * copies, dtype=torch.float32),
        assist_info_for_combine=torch.zeros(size.assist, dtype=torch.int32),
        expert_token_nums=torch.zeros(size.num_local, dtype=torch.int64),
        ep_recv_counts=torch.zeros(size.ep_recv, dtype=torch.int32),
        tp_recv_counts=torch.zeros(size.tp, dtype=torch.int32),
        expand_scales=torch.zeros(capacity, dtype=torch.float32),
    )
    parts = [own] if peer is None else [own, peer]
    _fill(result.expand_x, [row for part in parts for row in part.rows])
    _fill(result.dynamic_scales, [scale for part in parts for scale in part.dynamic_scales])
    _fill(result.assist_info_for_combine, own.assist_info)
    _fill(result.expand_scales, own.weights)
    _fill(result.ep_recv_counts, [count for part in parts for count in part.running])
    nums = [sum(nums) for nums in zip(*(part.num_per_local for part in parts), strict=True)]
    if expert_token_nums_type == 0:
        nums = [sum(nums[: local + 1]) for local in range(len(nums))]
    _fill(result.expert_token_nums, nums)
    if peer is not None:
        result.tp_recv_counts[tp_rank] = len(own.rows)
        result.tp_recv_counts[1 - tp_rank] = len(peer.rows)
    return result


def _fill(buffer: torch.Tensor, values: Sequence[torch.Tensor | float]) -> None:
    assert len(values) <= len(buffer)
    for i, value in enumerate(values):
        buffer[i] = value
