"""The exchange of token rows: which rows go where, there in the order of the experts, and back (specification §2.5).

One row travels for each token and destination rank. An assignment is one (token, k) that some rank computes; a shared
expert's has k = K + its number.

Shapes: Bs tokens, K experts per token, N assignments sent or received, R rows sent, W ranks, L experts per MoE rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from evenmoe.contract.layout import Layout
from evenmoe.errors import ConstraintError
from evenmoe.ops.row_order import order_by_source, order_received, rows_of_tokens, sort_assignments
from evenmoe.transport.call import GroupCall
from evenmoe.transport.packets import Incoming, Outgoing

# Bytes from which numpy asks for huge pages, so that writing to new memory costs a third less of a dispatch; its zeros
# are the system's own, which cost nothing until written. Below, torch's own allocator serves as well.
_LARGE = 1 << 22


@dataclass(frozen=True)
class Routing:
    """The assignments of one rank in sending order: by destination rank, then its local expert, then token.

    Attributes:
        token, k: int64 (N,).
        expert: int64 (N,), row of the smooth-scale table: shared expert e is e, physical expert m is Sn + m.
        counts: int64 (W, L), assignments per destination rank and local expert (column 0 alone on a shared rank).
    """

    token: torch.Tensor
    k: torch.Tensor
    expert: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Sending:
    """What a rank sends, by destination rank.

    Attributes:
        assignments: int32 (N, 3), token, k, and which of the destination's rows is the token's; a fourth number, where
            weights travel, is the bits of a float32.
        token: int64 (R,), the token of every row.
        outgoing: how many of both go where.
    """

    assignments: torch.Tensor
    token: torch.Tensor
    outgoing: Outgoing


@dataclass(frozen=True)
class Received:
    """What a rank holds after the exchange, ordered by local expert, source rank, token (§2.5).

    Attributes:
        rows: (N, …), as sent.
        source, token, k: int32 (N,), where each row came from.
        counts: int64 (W, L), rows per source and local expert.
        row: int64 (N,), which of the rows that came each one is: by source, then token, one for all of a token's.
        weight: float32 (N,), what the source gave the assignment, or None where weights do not travel.
    """

    rows: torch.Tensor
    source: torch.Tensor
    token: torch.Tensor
    k: torch.Tensor
    counts: torch.Tensor
    row: torch.Tensor
    weight: torch.Tensor | None = None


# Which rows go where ---------------------------------------------------------------------------------------------


def route(expert_ids: torch.Tensor, layout: Layout, x_active_mask: torch.Tensor | None = None) -> Routing:
    """Lay out what this rank sends.

    Args:
        expert_ids: integers (Bs, K), physical ids; ids of M and above are virtual and stay local.
        x_active_mask: bool (Bs,), of which only the number of True counts, or (Bs, K), or None.
    """
    num_tokens, top_k = expert_ids.shape
    physical, device = layout.num_experts, expert_ids.device
    # Assignments that stay local get a key above all others, so that a stable sort leaves the sent ones in front, by
    # expert and then in row-major order, which is token order since the ids of a token differ.
    key = expert_ids
    if x_active_mask is not None:
        key = torch.where(active_assignments(expert_ids, x_active_mask), key, physical)
    token, k, expert, counts_by_expert = _sorted(key.flatten(), physical, top_k)
    if not layout.shared_ranks:
        return Routing(token, k, expert, counts_by_expert.view(layout.ep, layout.experts_per_rank))
    counts = torch.zeros((layout.ep, layout.experts_per_rank), dtype=torch.int64, device=device)
    counts[layout.shared_ranks :] = counts_by_expert.view(-1, layout.experts_per_rank)
    active = active_tokens(num_tokens, x_active_mask, device).nonzero().flatten()
    shared = torch.arange(layout.shared_experts, device=device)
    holding = shared * layout.ranks_per_shared + layout.rank % layout.ranks_per_shared
    counts[holding, 0] = active.numel()
    shared = shared.repeat_interleave(active.numel())
    token = torch.cat([active.repeat(layout.shared_experts), token])
    k = torch.cat([top_k + shared, k])
    return Routing(token, k, torch.cat([shared, expert + layout.shared_experts]), counts)


def _sorted(key: torch.Tensor, bound: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """What `row_order.sort_assignments` returns, on any device."""
    if key.device.type == "cpu":
        token, k, expert, counts = sort_assignments(key.numpy(), bound, top_k)
        return torch.from_numpy(token), torch.from_numpy(k), torch.from_numpy(expert), torch.from_numpy(counts)
    key = key.clamp(max=bound)
    counts = torch.bincount(key, minlength=bound + 1)[:bound]
    sent = stable_order(key, bound + 1)[: int(counts.sum())]
    token = torch.div(sent, top_k, rounding_mode="floor")
    return token, sent - token * top_k, key[sent], counts


def sent_assignments(expert_ids: torch.Tensor, layout: Layout, x_active_mask: torch.Tensor | None) -> torch.Tensor:
    """bool (Bs, K): assignments that go to a MoE rank: active, and not virtual (§2.9, §2.10)."""
    sent = expert_ids < layout.num_experts
    return sent if x_active_mask is None else sent & active_assignments(expert_ids, x_active_mask)


def active_assignments(expert_ids: torch.Tensor, x_active_mask: torch.Tensor) -> torch.Tensor:
    """bool (Bs, K): what the mask leaves; the first n tokens for a 1-D mask with n True values (§2.9)."""
    if x_active_mask.dim() == 2:
        return x_active_mask
    tokens = torch.arange(expert_ids.shape[0], device=expert_ids.device)
    return (tokens < x_active_mask.sum())[:, None].expand(expert_ids.shape)


def active_tokens(num_tokens: int, x_active_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool (Bs,): tokens with any active assignment; they go to the shared experts and get an output row."""
    if x_active_mask is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    if x_active_mask.dim() == 2:
        return x_active_mask.any(dim=1)
    return torch.arange(num_tokens, device=device) < x_active_mask.sum()


def check_physical_ids(expert_ids: torch.Tensor, sent: torch.Tensor, num_ids: int) -> None:
    """Ids within 0…num_ids−1, and no physical expert twice in one token.

    Args:
        expert_ids: integers (Bs, K).
        sent: bool (Bs, K), from `sent_assignments`; all others (virtual experts, padding) may repeat an id.
        num_ids: physical and virtual experts.

    Raises:
        ConstraintError: naming the first token and k.
    """
    if expert_ids.numel() == 0:
        return
    check_range(expert_ids, num_ids)
    # Everything that may repeat gets a negative id of its own column.
    column = torch.arange(expert_ids.shape[1], device=expert_ids.device)
    compared = torch.where(sent, expert_ids, -1 - column)
    ordered = compared.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if repeated.any():
        token = int(repeated.nonzero()[0])
        raise ConstraintError(
            "expert_ids",
            f"{expert_ids[token].tolist()} for token {token}",
            "must not name one physical expert twice in a token",
            "use slot ids that are unique over the whole EPLB table",
        )


def check_range(expert_ids: torch.Tensor, num_ids: int) -> None:
    """Ids within 0…num_ids−1.

    Raises:
        ConstraintError: naming the first token and k.
    """
    if expert_ids.numel() == 0:
        return
    low, high = torch.aminmax(expert_ids)
    if low < 0 or high >= num_ids:
        token, k = ((expert_ids < 0) | (expert_ids >= num_ids)).nonzero()[0].tolist()
        raise ConstraintError(
            "expert_ids",
            f"{int(expert_ids[token, k])} for token {token}, k {k}",
            f"must be 0 to {num_ids - 1}",
            "map logical to physical ids with update_expert, and pass the number of slots as num_experts",
        )


def stable_order(keys: torch.Tensor, bound: int) -> torch.Tensor:
    """int64 (n,): positions that sort integer keys of 0…bound−1, equal ones in their order.

    >>> stable_order(torch.tensor([2, 0, 2, 1]), 3).tolist()
    [1, 3, 0, 2]
    """
    if keys.device.type != "cpu" or bound > 1 << 16:
        return torch.sort(keys, stable=True).indices
    # numpy sorts 16 bits by their digits, an eighth of the time of torch's comparisons for 4096 keys.
    return torch.from_numpy(keys.numpy().astype(np.uint16).argsort(kind="stable"))


# There -----------------------------------------------------------------------------------------------------------


def prepare_sending(
    routing: Routing,
    num_tokens: int,
    shape: tuple[int, ...],
    like: torch.Tensor,
    rows_differ_by_expert: bool = False,
    weights: torch.Tensor | None = None,
) -> Sending:
    """Work out which rows go where.

    Args:
        num_tokens: tokens on this rank.
        shape, like: of one row as it travels, and a tensor of its dtype and device.
        rows_differ_by_expert: a token's rows for two experts of one rank differ (smooth scales), so each must travel.
        weights: float32 (Bs, K), which travel with the assignments, or None. A shared expert's is 0.
    """
    if rows_differ_by_expert:
        per_rank = row_counts = sums(routing.counts, 1)
        token = routing.token
        before = torch.repeat_interleave(per_rank.cumsum(0) - per_rank, per_rank)
        row = torch.arange(len(before), device=before.device) - before
        assignments = torch.stack([routing.token, routing.k, row], dim=1).int()
    else:
        per_rank, row_counts, token, assignments = _rows_of_tokens(routing, num_tokens)
    if weights is not None:
        top_k = weights.shape[1]
        routed = routing.k < top_k
        # Clamped where it is not read, so that the index is one of the table's.
        at = routing.token * top_k + routing.k.clamp(max=max(top_k - 1, 0))
        weight = torch.where(routed, weights.flatten()[at], 0.0)
        assignments = torch.cat([assignments, weight.view(torch.int32)[:, None]], dim=1)
    outgoing = Outgoing((assignments.shape[1] * per_rank).tolist(), row_counts.tolist(), shape, like)
    return Sending(assignments, token, outgoing)


def check_room(counts: torch.Tensor, layout: Layout, global_bs: int) -> None:
    """Every row that comes finds a place among the `capacity` of this rank.

    Args:
        counts: int64 (W, L), rows that each source sends to each local expert of this rank.
        global_bs: of the call.

    Raises:
        ConstraintError: on a rank of MoE experts, ids occur twice in a token, which `check_values` would have found; on
            one of a shared expert, the ranks have different numbers of tokens and the first version's parts (§2.17) are
            larger than their mean.
    """
    rows = int(counts.sum())
    if rows <= layout.capacity:
        return
    if layout.is_shared:
        raise ConstraintError(
            "global_bs",
            f"{global_bs}, which makes room for {layout.capacity} rows, while {rows} come",
            "must make room for what every rank sends to the shared expert",
            "pass more, or pad the ranks to equal numbers of tokens",
        )
    rule, fix = f"must bring at most {layout.capacity} rows", "let no expert occur twice in a token"
    raise ConstraintError("expert_ids", f"such that {rows} rows come here", rule, fix)


def sums(counts: torch.Tensor, dim: int) -> torch.Tensor:
    """`counts.sum(dim)`, by NumPy on a CPU, in a third of the time for few counts."""
    if counts.device.type == "cpu":
        return torch.from_numpy(counts.numpy().sum(axis=dim))
    return counts.sum(dim=dim)


def _rows_of_tokens(routing: Routing, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """What `row_order.rows_of_tokens` returns, on any device."""
    counts, token, k = routing.counts, routing.token, routing.k
    if token.device.type == "cpu":
        found = rows_of_tokens(np.ascontiguousarray(counts.numpy()), token.numpy(), k.numpy(), num_tokens)
        return tuple(map(torch.from_numpy, found))
    per_rank = sums(counts, 1)
    tokens, destination = max(num_tokens, 1), torch.repeat_interleave(per_rank)
    pair, row = torch.unique(destination * tokens + token, return_inverse=True)  # by destination, then token
    rows = torch.bincount(pair // tokens, minlength=len(per_rank))
    row = row - (rows.cumsum(0) - rows)[destination]
    return per_rank, rows, pair % tokens, torch.stack([token, k, row], dim=1).int()


def received(
    call: GroupCall,
    sending: Sending,
    counts: torch.Tensor,
    incoming: Incoming,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> Received:
    """What was sent here, in the order of the experts.

    Args:
        sending: what this rank sent. incoming: what came.
        counts: int64 (W, L), assignments that each source sends to each local expert of this rank.
        allocate: N -> memory (N, …) for the rows received. None for new memory.
    """
    which, source, assignments = _ordered(counts, incoming, sending.assignments.shape[1])
    weight = assignments[:, 3].contiguous().view(torch.float32) if assignments.shape[1] == 4 else None
    like = incoming.like
    num_rows = which.shape[0]
    out = call.group.new_rows((num_rows, *like.shape[1:]), like) if allocate is None else allocate(num_rows)
    rows = incoming.take(which, out)
    return Received(rows, source, assignments[:, 0], assignments[:, 1], counts, which, weight)


def _ordered(counts: torch.Tensor, incoming: Incoming, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `row_order.order_received` returns, on any device."""
    numbers = incoming.numbers.view(-1, columns)
    if numbers.device.type == "cpu":
        counted = np.ascontiguousarray(counts.numpy())
        which, source, ordered = order_received(counted, incoming.first, numbers.numpy())
        return torch.from_numpy(which), torch.from_numpy(source), torch.from_numpy(ordered)
    order, source = received_order(counts)
    ordered = numbers[order]
    first = torch.from_numpy(incoming.first).to(source.device)
    return first[source] + ordered[:, 2], source.int(), ordered


def received_order(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that turn rows ordered by (source, local expert) into the order (local expert, source).

    Args:
        counts: int64 (W, L), rows from each source for each local expert.

    Returns:
        int64 (counts.sum(),), positions in the received rows; and as many, the source of each in the new order.

    Rank 0 sent one row for each expert, rank 1 two rows for expert 0:

    >>> received_order(torch.tensor([[1, 1], [2, 0]]))
    (tensor([0, 2, 3, 1]), tensor([0, 1, 1, 0]))
    """
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    lengths = counts.T.flatten()
    stops = lengths.cumsum(0)
    run = torch.repeat_interleave(lengths)  # which (local expert, source rank) each row is of
    shift = starts.T.flatten() - (stops - lengths)
    return shift[run] + torch.arange(len(run), device=run.device), run % len(counts)


# And back --------------------------------------------------------------------------------------------------------


def prepare_returning(
    source: torch.Tensor, world_size: int, shape: tuple[int, ...], like: torch.Tensor, numbered: bool
) -> tuple[torch.Tensor, Outgoing]:
    """Work out how rows return to the ranks that they came from.

    Args:
        source: integers (N,), the source rank of each row.
        shape, like: of one row as it travels, and a tensor of its dtype and device.
        numbered: whether one number travels with each row.

    Returns:
        int64 (N,), the rows in the order of the ranks that they go to; and how many go where.
    """
    if source.device.type == "cpu":
        order, each = map(torch.from_numpy, order_by_source(source.numpy(), world_size))
        if order.shape[0] < source.shape[0]:
            value, rule = "such that rows came from ranks that there are not", f"must name ranks 0 to {world_size - 1}"
            raise ConstraintError("dispatched", value, rule, "pass what dispatch returned, unchanged")
    else:
        order, each = stable_order(source, world_size), torch.bincount(source, minlength=world_size)
    counts = each.tolist()
    return order, Outgoing(counts if numbered else [0] * world_size, counts, shape, like)


def positions_of(incoming: Incoming, assignments: torch.Tensor, num_assignments: int) -> torch.Tensor:
    """int64 (num_assignments,): which of the returned rows is that of each, −1 where there is none.

    Args:
        assignments: int64 (N,), which one each returned row is for, in the order in which they came.
    """
    position = torch.full((num_assignments,), -1, dtype=torch.int64, device=assignments.device)
    position[assignments] = torch.arange(len(assignments), device=assignments.device)
    return position


# Memory ----------------------------------------------------------------------------------------------------------


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
