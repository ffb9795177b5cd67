"""The exchange of ElasticBuffer: a token reaches a rank once, in the next free slot (specification §16).

Nothing is quantized and nothing is weighted: rows travel bit for bit, and come back to be added up.

Shapes: W ranks, L experts of each, Bs tokens, H hidden, K experts per token, S slots received, A rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import positions_of, prepare_returning, stable_order
from evenmoe.ops.weighted_sum import add_rows
from evenmoe.transport.agreement import Header
from evenmoe.transport.call import GroupCall
from evenmoe.transport.packets import Outgoing


@dataclass(frozen=True)
class Arrived:
    """What one rank holds after tokens were sent, by local expert, source rank, slot and k.

    Attributes:
        rows: uint8 (A, bytes of a row), as sent.
        weights: float32 (A,), or None when none were sent.
        metadata: int32 (A, 4), source rank, token there, k, and slot.
        per_rank: int32 (W,), slots filled by each source. per_expert: int64 (L,), rows of each local expert.
        slots: int32 (Bs, K), the slot of every entry on the rank of its expert; −1 where nothing is sent.
    """

    rows: torch.Tensor
    weights: torch.Tensor | None
    metadata: torch.Tensor
    per_rank: torch.Tensor
    per_expert: torch.Tensor
    slots: torch.Tensor


def send_tokens(
    part: GroupCall,
    header: Header,
    rows: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    experts_per_rank: int,
) -> Arrived:
    """Send every token once to each rank that holds one of its experts.

    Args:
        rows: uint8 (Bs, bytes of a row).
        topk_idx: int32 (Bs, K), expert e lives on rank e // L; a negative id is not sent. Ids may repeat.
        topk_weights: float32 (Bs, K), which travel with the row, or None.
    """
    world_size, rank = part.group.world_size, part.group.rank
    num_tokens, top_k = topk_idx.shape
    ids = topk_idx.long()
    destination = torch.where(ids < 0, -1, torch.div(ids, experts_per_rank, rounding_mode="floor"))
    reached = torch.zeros((world_size + 1, num_tokens), dtype=torch.bool, device=ids.device)  # the last: nowhere
    own = torch.arange(num_tokens, device=ids.device)[:, None]
    reached[destination, own] = True
    sent = reached[:world_size]
    slots = torch.where(ids < 0, -1, (sent.cumsum(1) - 1)[destination.clamp(min=0), own]).int()
    token = sent.nonzero()[:, 1]  # by destination, then token
    numbers = [token[:, None].int(), topk_idx[token]]
    if topk_weights is not None:
        numbers.append(topk_weights[token].contiguous().view(torch.int32))
    described = torch.cat(numbers, dim=1)
    counts = sent.sum(1).tolist()
    width = described.shape[1]
    outgoing = Outgoing([n * width for n in counts], counts, rows.shape[1:], rows)
    nothing = torch.zeros((world_size, 0), dtype=torch.int64)
    _, incoming = part.send(header, nothing, outgoing, rows, token, described.flatten())

    per_rank = torch.from_numpy(incoming.rows).to(rows.device)
    described = incoming.numbers.view(-1, width)
    source = torch.repeat_interleave(per_rank)
    first = (per_rank.cumsum(0) - per_rank)[source]
    own_slot = torch.arange(len(source), device=rows.device) - first
    local = described[:, 1 : 1 + top_k].long() - rank * experts_per_rank
    row, k = ((local >= 0) & (local < experts_per_rank)).nonzero().unbind(1)
    order = stable_order(local[row, k], experts_per_rank)
    row, k = row[order], k[order]
    weights = None
    if topk_weights is not None:
        weights = described[row, 1 + top_k + k].contiguous().view(torch.float32)
    return Arrived(
        rows=incoming.take(row),
        weights=weights,
        metadata=torch.stack([source[row], described[row, 0].long(), k, own_slot[row]], dim=1).int(),
        per_rank=per_rank.int(),
        per_expert=torch.bincount(local[row, k], minlength=experts_per_rank),
        slots=slots,
    )


def return_rows(
    part: GroupCall,
    header: Header,
    dispatch: int,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    metadata: torch.Tensor,
    topk_idx: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Send the experts' rows back to their tokens, and add up those of each token, unweighted.

    Args:
        dispatch: the number of the dispatch that the rows are of, `agreement.UNKNOWN` if it is not known.
        rows: (A, H) of any float dtype. weights: float32 (A,) that travel back with them, or None.
        metadata: int32 (A, 4), of `send_tokens`. topk_idx: int32 (Bs, K), of this rank's tokens.

    Returns:
        float32 (Bs, H), the sums in float32, k ascending; float32 (Bs, K), the weights that came back, zero where none
        is due, or None.
    """
    num_tokens, top_k = topk_idx.shape
    source, token, k = metadata[:, :3].long().unbind(1)
    outside = (source < 0) | (source >= part.group.world_size) | (token < 0) | (k < 0) | (k >= top_k)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ConstraintError(
            "recv_src_metadata",
            f"{metadata[row].tolist()} for row {row}",
            f"must be (rank below {part.group.world_size}, token, k below {top_k}, slot)",
            "pass the handle that dispatch returned, unchanged",
        )
    each = 1 if weights is None else 2
    order, outgoing = prepare_returning(source, part.group.world_size, rows.shape[1:], rows, numbered=True)
    outgoing = Outgoing([each * n for n in outgoing.numbers], outgoing.rows, outgoing.shape, rows)
    nothing = torch.zeros((part.group.world_size, 0), dtype=torch.int64)
    numbers = [(token * top_k + k)[order].int()]
    if weights is not None:
        numbers.append(weights[order].contiguous().view(torch.int32))
    along = torch.stack(numbers, dim=1).flatten()
    _, incoming = part.send(header, nothing, outgoing, rows, order, along, dispatch)

    described = incoming.numbers.view(-1, each)
    entries, due = described[:, 0].long(), (topk_idx >= 0).flatten()
    in_range = bool(((entries >= 0) & (entries < due.numel())).all())
    if not in_range or not torch.equal(torch.bincount(entries, minlength=due.numel()), due.long()):
        raise ConstraintError(
            "handle",
            f"such that {int(due.sum())} rows are due here, while {len(entries)} came, not one for each",
            "must be of one dispatch on all ranks",
            "pass the handle of the dispatch whose rows are combined",
        )
    position = positions_of(incoming, entries, due.numel()).view(num_tokens, top_k)
    total = torch.zeros((num_tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    add_rows(total, incoming, position, torch.ones((num_tokens, top_k), device=rows.device))
    if weights is None:
        return total, None
    returned = torch.zeros(due.numel(), dtype=torch.float32, device=rows.device)
    returned[entries] = described[:, 1].contiguous().view(torch.float32)
    return total, returned.view(num_tokens, top_k)
