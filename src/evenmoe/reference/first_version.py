"""MoeDistributeDispatch and MoeDistributeCombine, the first versions, over the whole world (§2.17, §3.8).

Ranks are EP-major in every list, as in `world`. Masks are not looked at, and there are no virtual experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from evenmoe.reference.numerics import quantize_token, through_int8_transport, tp_sum
from evenmoe.reference.world import ceil_div


class DispatchedV1(NamedTuple):
    """The seven outputs of one rank; all but `expand_idx`, int32 (Bs·K,), as in `evenmoe.Dispatched`."""

    expand_x: torch.Tensor
    dynamic_scales: torch.Tensor
    expand_idx: torch.Tensor
    expert_token_nums: torch.Tensor
    ep_recv_counts: torch.Tensor
    tp_recv_counts: torch.Tensor
    expand_scales: torch.Tensor


class _World(NamedTuple):
    ep: int
    tp: int
    experts: int
    shared_ranks: int

    @property
    def experts_per_rank(self) -> int:
        return self.experts // (self.ep - self.shared_ranks)

    def entry(self, rank: int, tp_rank: int) -> int:
        return rank * max(self.tp, 1) + tp_rank

    def num_local(self, rank: int) -> int:
        return 1 if rank < self.shared_ranks else self.experts_per_rank

    def home(self, expert: int) -> tuple[int, int]:
        return self.shared_ranks + expert // self.experts_per_rank, expert % self.experts_per_rank

    def shared_home(self, source: int, token: int, num_tokens: int) -> tuple[int, int]:
        """The rank that gets `token` of `source` for the shared expert, and which of the rows from there it is."""
        if source < self.shared_ranks:
            return source, token
        before = source * num_tokens // self.shared_ranks
        rank = ceil_div((token + 1 + before) * self.shared_ranks, num_tokens) - 1 - source
        return rank, token - ((rank + source) * num_tokens // self.shared_ranks - before)

    def counted(self, rank: int, source: int, num_tokens: int, rows: int) -> int:
        """What ep_recv_counts of `rank` has for `source`: a shared rank's own tokens stand under all shared ranks."""
        if rank < self.shared_ranks and source < self.shared_ranks:
            return (source + 1 + rank) * num_tokens // self.shared_ranks - (
                source + rank
            ) * num_tokens // self.shared_ranks
        return rows


class _Row(NamedTuple):
    values: torch.Tensor
    scale: torch.Tensor | None


def dispatch_v1(
    x: Sequence[torch.Tensor],
    expert_ids: Sequence[torch.Tensor],
    *,
    num_experts: int,
    tp_world_size: int = 0,
    scales: torch.Tensor | None = None,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> list[DispatchedV1]:
    """Send every token to the ranks of its experts, and to one rank of the shared expert.

    Args:
        x, expert_ids, num_experts, tp_world_size, quant_mode, global_bs, expert_token_nums_type: as in
            `reference.dispatch.dispatch`; no rank is gone.
        scales: float32 (M or, with ranks of the shared expert, 1 + M, H), or None.
        shared_expert_rank_num: Sr, a divisor of the ranks, or 0.

    Source: §2.17. Two ranks with one expert each; rank 1's tokens both go to expert 0:

    >>> ids = [torch.tensor([[1]]), torch.tensor([[0], [0]])]
    >>> one, two = dispatch_v1([torch.ones(1, 1), torch.tensor([[3.0], [4.0]])], ids, num_experts=2, global_bs=4)
    >>> one.expand_x.flatten().tolist(), one.ep_recv_counts.tolist(), two.expand_idx.tolist()
    ([3.0, 4.0, 0.0, 0.0], [0, 2], [0, 1])
    """
    world = _World(len(x) // max(tp_world_size, 1), tp_world_size, num_experts, shared_expert_rank_num)
    windows: dict[tuple[int, int, int, int], list[_Row]] = {}  # TP rank, rank, local expert, source -> rows
    expand_idx: list[list[int]] = []
    for d in range(len(x)):
        source, tp_rank = divmod(d, max(world.tp, 1))
        expand_idx.append(_send(world, source, tp_rank, x[d], expert_ids[d], scales, quant_mode, windows))
    results = []
    for d in range(len(x)):
        rank, tp_rank = divmod(d, max(world.tp, 1))
        parts = [
            _received(world, rank, t, windows, x) for t in ([tp_rank, 1 - tp_rank] if world.tp == 2 else [tp_rank])
        ]
        results.append(_write(world, d, parts, x[d], expert_ids[d], expand_idx[d], quant_mode, global_bs))
        nums = [sum(count) for count in zip(*(part[2] for part in parts), strict=True)]
        if expert_token_nums_type == 0:
            nums = [sum(nums[: local + 1]) for local in range(len(nums))]
        results[d].expert_token_nums[:] = torch.tensor(nums)
    return results


def _send(
    world: _World,
    source: int,
    tp_rank: int,
    x: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor | None,
    quant_mode: int,
    windows: dict[tuple[int, int, int, int], list[_Row]],
) -> list[int]:
    """Put the rows of one rank into the others' windows; which row of its window each (token, k) is."""

    def row(token: int, scale_row: int) -> _Row:
        if quant_mode == 0:
            return _Row(x[token], None)
        return _Row(*quantize_token(x[token], None if scales is None else scales[scale_row]))

    places = []
    for token in range(len(ids)):
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            rank, local = world.home(expert)
            window = windows.setdefault((tp_rank, rank, local, source), [])
            places.append(len(window))
            window.append(row(token, expert + (1 if world.shared_ranks else 0)))
        if world.shared_ranks:
            rank, place = world.shared_home(source, token, len(ids))
            window = windows.setdefault((tp_rank, rank, 0, source), [])
            assert place == len(window)
            window.append(row(token, 0))
    return places


def _received(
    world: _World,
    rank: int,
    tp_rank: int,
    windows: dict[tuple[int, int, int, int], list[_Row]],
    x: Sequence[torch.Tensor],
) -> tuple[list[_Row], list[int], list[int]]:
    """The rows of one rank, its running sums over (local expert, source), and the rows of each local expert."""
    rows: list[_Row] = []
    running: list[int] = []
    nums: list[int] = []
    total = 0
    num_tokens = len(x[world.entry(rank, tp_rank)])
    for local in range(world.num_local(rank)):
        before = len(rows)
        # A rank of the shared expert puts its own tokens first, wherever it stands among such ranks.
        for source in range(world.ep):
            window = windows.get((tp_rank, rank, local, source), [])
            rows.extend(window)
            total += world.counted(rank, source, num_tokens, len(window))
            running.append(total)
        nums.append(len(rows) - before)
    assert total == len(rows)
    return rows, running, nums


def _write(
    world: _World,
    d: int,
    parts: list[tuple[list[_Row], list[int], list[int]]],
    x: torch.Tensor,
    ids: torch.Tensor,
    expand_idx: list[int],
    quant_mode: int,
    global_bs: int,
) -> DispatchedV1:
    rank, tp_rank = divmod(d, max(world.tp, 1))
    everybody, copies = global_bs or len(x) * world.ep, max(world.tp, 1)
    capacity = everybody * min(world.experts_per_rank, ids.shape[1])
    if rank < world.shared_ranks:
        capacity = everybody // world.shared_ranks
    result = DispatchedV1(
        expand_x=torch.zeros((capacity * copies, x.shape[1]), dtype=torch.int8 if quant_mode == 2 else x.dtype),
        dynamic_scales=torch.zeros(capacity * copies, dtype=torch.float32),
        expand_idx=torch.tensor(expand_idx, dtype=torch.int32),
        expert_token_nums=torch.zeros(world.num_local(rank), dtype=torch.int64),
        ep_recv_counts=torch.zeros(world.ep * world.num_local(rank) * copies, dtype=torch.int32),
        tp_recv_counts=torch.zeros(world.tp, dtype=torch.int32),
        expand_scales=torch.zeros(capacity, dtype=torch.float32),
    )
    for i, row in enumerate(row for part in parts for row in part[0]):
        result.expand_x[i] = row.values
        if row.scale is not None:
            result.dynamic_scales[i] = row.scale
    for i, count in enumerate(count for part in parts for count in part[1]):
        result.ep_recv_counts[i] = count
    if world.tp == 2:
        result.tp_recv_counts[tp_rank] = len(parts[0][0])
        result.tp_recv_counts[1 - tp_rank] = len(parts[1][0])
    return result


def combine_v1(
    expand_x: Sequence[torch.Tensor],
    expert_ids: Sequence[torch.Tensor],
    dispatched: Sequence[DispatchedV1],
    expert_scales: Sequence[torch.Tensor],
    *,
    num_experts: int,
    tp_world_size: int = 0,
    shared_expert_rank_num: int = 0,
    comm_quant_mode: int = 0,
) -> list[torch.Tensor]:
    """Send every expert's output back to its token, and sum the K of them, weighted, and the shared expert's.

    Args:
        expand_x: per rank (≥ rows, H), the experts' outputs in dispatch's row order.
        expert_ids, num_experts, tp_world_size, shared_expert_rank_num: as given to dispatch.
        dispatched: dispatch's results; expand_idx and the counts are read from them.
        expert_scales: per rank float32 (Bs,K) gate weights.
        comm_quant_mode: 0, or 2: rows cross as int8 (§3.5; not with TP).

    Source: §3.8. One rank, one token, two experts that double and triple it: 0.5·2x + 0.25·3x:

    >>> ids = [torch.tensor([[0, 1]])]
    >>> dispatched = dispatch_v1([torch.tensor([[4.0, 8.0]])], ids, num_experts=2)
    >>> outputs = [dispatched[0].expand_x * torch.tensor([[2.0], [3.0]])]
    >>> combine_v1(outputs, ids, dispatched, [torch.tensor([[0.5, 0.25]])], num_experts=2)
    [tensor([[ 7., 14.]])]
    """
    world = _World(len(expand_x) // max(tp_world_size, 1), tp_world_size, num_experts, shared_expert_rank_num)
    windows: dict[tuple[int, int, int, int], list[torch.Tensor]] = {}  # TP rank, source, rank, local -> rows back
    for d in range(len(expand_x)):
        rank, tp_rank = divmod(d, max(world.tp, 1))
        counts = dispatched[d].ep_recv_counts.tolist()
        own = counts[world.ep * world.num_local(rank) - 1]
        i = 0
        for local in range(world.num_local(rank)):
            for source in range(world.ep):
                while i < counts[local * world.ep + source]:
                    row = expand_x[d][i]
                    if world.tp == 2:
                        peer = world.entry(rank, 1 - tp_rank)
                        behind = int(dispatched[peer].ep_recv_counts[world.ep * world.num_local(rank) - 1])
                        row = tp_sum(row, expand_x[peer][behind + i])
                    if comm_quant_mode == 2:
                        row = through_int8_transport(row)
                    to = (
                        rank if max(rank, source) < world.shared_ranks else source
                    )  # its own tokens, whatever is counted
                    windows.setdefault((tp_rank, to, rank, local), []).append(row)
                    i += 1
        assert i == own
    results = []
    for d, (ids, weights) in enumerate(zip(expert_ids, expert_scales, strict=True)):
        source, tp_rank = divmod(d, max(world.tp, 1))
        places = dispatched[d].expand_idx.tolist()
        out = torch.zeros((len(ids), expand_x[d].shape[1]), dtype=torch.float32)
        for token in range(len(ids)):
            for k in range(ids.shape[1]):
                rank, local = world.home(int(ids[token, k]))
                row = windows[tp_rank, source, rank, local][places[token * ids.shape[1] + k]]
                out[token] = out[token] + weights[token, k] * row.float()
            if world.shared_ranks:
                rank, place = world.shared_home(source, token, len(ids))
                out[token] = out[token] + windows[tp_rank, source, rank, 0][place].float()
        results.append(out.to(expand_x[d].dtype))
    return results
