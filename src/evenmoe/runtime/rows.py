"""`DispatchedRows`: what a rank computes on; and how rows that it made of them return to their tokens.

Shapes: T tokens of this rank, H hidden, K experts per token, S slots, W ranks, R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import Routing, prepare_returning, sums
from evenmoe.ops.row_order import positions_returned, rows_of_sums
from evenmoe.ops.weighted_sum import sum_dtype, sum_rows
from evenmoe.transport.agreement import Header
from evenmoe.transport.call import GroupCall
from evenmoe.transport.packets import Incoming, Outgoing, Words


@dataclass(frozen=True)
class PartialSums:
    """Which rows a rank adds up before they return, one sum for every (token, rank), and what they are weighted by.

    Attributes:
        row: int64 (R,), the sum that each row belongs to; by source rank, then token. came: int64 (W,), sums for each.
        weights: float32 (R,).
        token: int64 (N,), this rank's token of each sum that returns, by rank. sent: W numbers of these.
    """

    row: torch.Tensor
    came: Words
    weights: torch.Tensor
    token: torch.Tensor
    sent: Sequence[int]


@dataclass(frozen=True)
class DispatchedRows:
    """What one rank computes on; made by `ExpertParallel.dispatch`, used by `ExpertParallel.combine`.

    Attributes:
        rows: (R, H), dtype of x, ordered by slot of this rank, source rank, token.
        num_tokens_per_expert: int64 (slots of this rank,), rows per slot; they add up to R.
        source_rank, source_token, source_k: int32 (R,), the (rank, token, k) that each row serves.
        slots: integers (T, K), the slot that each assignment of this rank went to; S where none is computed.
        topk_weights: float32 (T, K), or float64 where they were so; with the gradients of what dispatch was given.
        layer, number: which layer's dispatch it is, and which exchange of the group; the same on all ranks.
        partial: what `combine="reduced"` needs; None for the exact sum.
        link: (0,), what lets the backward of combine come before that of dispatch on every rank; None if no rank needs
            gradients of x.
    """

    rows: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor
    source_k: torch.Tensor
    slots: torch.Tensor
    routing: Routing
    topk_weights: torch.Tensor
    group_name: str
    layer: int
    number: int
    partial: PartialSums | None = None
    link: torch.Tensor | None = None


def return_rows(
    call: GroupCall, header: Header, dispatched: DispatchedRows, rows: torch.Tensor
) -> tuple[Incoming, torch.Tensor]:
    """Send a row for each dispatched one to the rank of its token.

    Args:
        rows: (R, …).

    Returns:
        What came; int64 (T, K), the position of every assignment's row in it, -1 where there is none.

    Raises:
        ConstraintError: other rows come than were sent out, so that `dispatched` is not what dispatch returned.
    """
    routing, shape = dispatched.routing, dispatched.topk_weights.shape
    order, outgoing = prepare_returning(
        dispatched.source_rank, call.group.world_size, rows.shape[1:], rows, numbered=False
    )
    back = torch.from_numpy(np.array(outgoing.rows)[:, None])
    told, incoming = call.send(header, back, outgoing, rows, order, dispatch=dispatched.number)
    position = positions_in_order(routing, told, shape)
    if position is None:
        raise _other_rows(told, sums(routing.counts, 1).tolist())
    return incoming, position


def return_sums(
    call: GroupCall, header: Header, dispatched: DispatchedRows, partial: PartialSums, rows: torch.Tensor
) -> tuple[Incoming, torch.Tensor]:
    """Send a row for each token and rank to the rank of the token: the weighted sum of the token's rows here.

    Sums are in `sum_dtype`, k ascending, and rounded to the dtype of the rows for their way.

    Args:
        rows: (R, …), as in `return_rows`.

    Returns:
        What came; int64 (T, W), the position of every rank's sum for a token, −1 where there is none.

    Raises:
        ConstraintError: as in `return_rows`.
    """
    world_size, (num_tokens, top_k) = call.group.world_size, dispatched.topk_weights.shape
    shape, dtype = (int(partial.came.sum()), top_k), sum_dtype(rows.dtype)
    weights = torch.zeros(shape, dtype=dtype, device=rows.device)
    of_sum = torch.full(shape, -1, dtype=torch.int64, device=rows.device)
    row, k, given = partial.row, dispatched.source_k, partial.weights.to(dtype)
    if rows.device.type == "cpu":
        rows_of_sums(row.numpy(), k.numpy(), given.numpy(), of_sum.numpy(), weights.numpy())
    else:
        of_sum[row, k.long()] = torch.arange(rows.shape[0], device=rows.device)
        weights[row, k.long()] = given
    sums_here = sum_rows(rows, of_sum, weights, call.group.new_rows((shape[0], *rows.shape[1:]), rows))
    outgoing = Outgoing([0] * world_size, partial.came.tolist(), tuple(rows.shape[1:]), sums_here)
    back = torch.from_numpy(partial.came[:, None])
    told, incoming = call.send(header, back, outgoing, sums_here, dispatch=dispatched.number)
    if told[:, 0].tolist() != list(partial.sent):
        raise _other_rows(told, list(partial.sent))
    position = torch.full((num_tokens, world_size), -1, dtype=torch.int64, device=rows.device)
    rank = torch.repeat_interleave(torch.tensor(partial.sent, device=rows.device))
    position[partial.token, rank] = torch.arange(len(rank), device=rows.device)
    return incoming, position


def _other_rows(told: torch.Tensor, sent_out: list[int]) -> ConstraintError:
    return ConstraintError(
        "dispatched",
        f"such that {told[:, 0].tolist()} rows come back from the ranks where {sent_out} were sent to them",
        "must be what dispatch returned, unchanged",
        "pass it to combine as it is",
    )


def positions_in_order(routing: Routing, came: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """int64 (T, K), the position of every assignment's row among those that have come in the order of `routing`.

    Args:
        came: int64 (W, 1), how many rows have come from every rank. shape: (T, K).

    Returns:
        The positions, −1 where no row is due; None where other numbers of rows have come.
    """
    device = routing.token.device
    if device.type == "cpu":
        counts, position = np.ascontiguousarray(routing.counts.numpy()), np.empty(shape, np.int64)
        token, k = routing.token.numpy(), routing.k.numpy()
        return torch.from_numpy(position) if positions_returned(counts, came.numpy(), token, k, position) else None
    if not torch.equal(came[:, 0].cpu(), sums(routing.counts, 1).cpu()):
        return None
    position = torch.full(shape, -1, dtype=torch.int64, device=device)
    position[routing.token, routing.k] = torch.arange(len(routing.k), device=device)
    return position
