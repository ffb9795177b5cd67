"""The experts' rows travel home: the half of combine that crosses ranks (§3.3).

Shapes: Bs tokens, H hidden, K experts per token, Sn shared experts on ranks of their own, W ranks, n rows of this rank.
A token's rows have K + Sn places: k for its k-th expert, K + e for shared expert e.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from evenmoe.contract.layout import Layout
from evenmoe.errors import ConstraintError
from evenmoe.ops.groups import active_ranks, calls_of, find_groups, in_order
from evenmoe.ops.quantise import pack_blocks, unpack_blocks
from evenmoe.ops.routing import active_tokens, runs, sent_entries
from evenmoe.ops.values import check_physical_ids
from evenmoe.transport.agreement import DISPATCH, UNKNOWN, digest, dtype_code
from evenmoe.transport.call import GroupCall, Outgoing, together

BLOCK_INT8 = 2  # comm_quant_mode of §3.5


def bring_home(prepare: Callable[[], Layout], given: Mapping[str, Any]) -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """Check the call, then exchange: rows summed with the peer's if there is one, and sent to their tokens.

    Args:
        prepare: () -> Layout, the checks of the operator.
        given: the arguments of the registered operator.

    Returns:
        layout; rows (N, H) received, in the dtype of expand_x; place int64 (Bs, K + Sn), the row of every place, −1
        for places that nothing was sent for.
    """
    ep, tp = find_groups(given)
    expand_x, expert_ids = given["expand_x"], given["expert_ids"]
    scaled_down = given["elastic_info"] is not None
    across, beside = calls_of("combine", ep, tp, scaled_down, expand_x)
    with together(*in_order("combine", across, beside)):
        layout = prepare()
        if scaled_down:
            across.narrow(active_ranks(ep, layout))
        if given["check_values"]:
            sent = sent_entries(expert_ids, layout, given["x_active_mask"])
            virtual = given["zero_expert_num"] + given["copy_expert_num"] + given["const_expert_num"]
            check_physical_ids(expert_ids, sent, layout.num_experts + virtual, layout.num_experts)
        num_rows = _own_rows(layout, given)
        triples = given["assist_info_for_combine"][: 3 * num_rows].reshape(num_rows, 3).long()
        if given["check_values"]:
            _check_triples(triples, layout)
        rows = expand_x[:num_rows]
        if beside is not None:
            rows = _add_peer_rows(rows, expand_x, beside, layout, given)
        rows, place = _send_home(rows, triples, across, layout, given)
        return layout, rows, place


def _own_rows(layout: Layout, given: Mapping[str, Any]) -> int:
    """The last of this rank's own prefix sums (§3.3)."""
    last = layout.ep * layout.local_experts - 1
    if last >= len(given["ep_send_counts"]):  # which the chip's own check lets through without TP (§3.2)
        raise ConstraintError(
            "ep_send_counts",
            f"of length {len(given['ep_send_counts'])}",
            f"must hold {last + 1} counts, one per local expert and source rank",
            "pass the ep_recv_counts that dispatch returned",
        )
    num_rows = int(given["ep_send_counts"][last])
    if not 0 <= num_rows <= min(layout.capacity, len(given["expand_x"])):
        raise ConstraintError(
            "ep_send_counts",
            f"{num_rows} at {last}",
            f"must count 0 to {min(layout.capacity, len(given['expand_x']))} rows of this rank",
            "pass the ep_recv_counts that dispatch returned",
        )
    return num_rows


def _check_triples(triples: torch.Tensor, layout: Layout) -> None:
    """Ranks of the world, and places that some rank can have; whether they are the right ones, its owner checks."""
    source, token, k = triples.unbind(dim=1)
    places = layout.top_k + layout.shared_experts
    wrong = (source < 0) | (source >= layout.ep) | (token < 0) | (token >= layout.max_bs) | (k < 0) | (k >= places)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ConstraintError(
            "assist_info_for_combine",
            f"{triples[row].tolist()} for row {row}",
            f"must be (rank below {layout.ep}, token below {layout.max_bs}, k below {places})",
            "pass what dispatch returned, unchanged",
        )


def _add_peer_rows(
    rows: torch.Tensor, expand_x: torch.Tensor, call: GroupCall, layout: Layout, given: Mapping[str, Any]
) -> torch.Tensor:
    """§3.3: own row i plus the peer's row for the same token, which is the peer's row n_peer + i."""
    peer, own, tp_send_counts = 1 - call.group.rank, len(rows), given["tp_send_counts"]
    theirs = int(tp_send_counts[peer])
    sizes = {**_sizes(rows, layout, given, group=1), "expert parallel rank": layout.rank}
    # What each hands over and what each holds, so that both peers refuse what one of them got wrong.
    mine = torch.tensor([[theirs, own]] * 2, device=expand_x.device)
    offer = expand_x[own : own + theirs]
    to_each = [0, 0]
    to_each[peer] = len(offer)
    offered, held = call.agree(sizes, mine, Outgoing([0, 0], to_each, rows.shape[1:], rows))[peer].tolist()
    if offered != own or theirs != held:
        raise ConstraintError(
            "tp_send_counts",
            f"{tp_send_counts.tolist()} with {own} rows of this rank, {held} of its peer and {offered} offered by it",
            "must count the rows of both peers, own first in expert_out",
            "pass the tp_recv_counts and ep_recv_counts that dispatch returned on both peers",
        )
    incoming = call.exchange(offer)
    received = incoming.buffer[incoming.first[peer] :][:own]
    # float16 too: a sum of two float16 in float32, rounded once more, is the sum rounded once (24 ≥ 2·11 + 2 bits).
    return (rows.float() + received.float()).to(rows.dtype)


def _send_home(
    rows: torch.Tensor, triples: torch.Tensor, call: GroupCall, layout: Layout, given: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to the ranks in their triples; returns the rows received and the place of each."""
    places = layout.top_k + layout.shared_experts
    source = triples[:, 0]
    order = torch.sort(source, stable=True).indices
    send_counts = torch.bincount(source, minlength=call.group.world_size).tolist()
    packed = given["comm_quant_mode"] == BLOCK_INT8
    travelling, index = (pack_blocks(rows.index_select(0, order)), None) if packed else (rows, order)
    outgoing = Outgoing(send_counts, send_counts, travelling.shape[1:], travelling)
    call.agree(_sizes(rows, layout, given), torch.zeros((call.group.world_size, 0), dtype=torch.int64), outgoing)
    sent_place = (triples[:, 1] * places + triples[:, 2])[order]
    incoming = call.exchange(travelling, index, sent_place.int())
    slot = incoming.numbers.long()
    if given["check_values"]:
        _check_places(slot, layout, given)
    place = torch.full((layout.num_tokens * places,), -1, dtype=torch.int64, device=rows.device)
    starts, lengths = torch.tensor([incoming.first, incoming.rows], device=rows.device)
    place[slot] = runs(starts, lengths)
    received = unpack_blocks(incoming.buffer, layout.hidden, rows.dtype) if packed else incoming.buffer
    return received, place.view(layout.num_tokens, places)


def _check_places(slot: torch.Tensor, layout: Layout, given: Mapping[str, Any]) -> None:
    """Exactly one row came home for every entry that was sent out."""
    expected = sent_entries(given["expert_ids"], layout, given["x_active_mask"])
    active = active_tokens(layout.num_tokens, given["x_active_mask"], slot.device)
    expected = torch.cat([expected, active[:, None].expand(-1, layout.shared_experts)], dim=1).flatten()
    in_range = bool(((slot >= 0) & (slot < expected.numel())).all())
    received = torch.bincount(slot, minlength=expected.numel()) if in_range else slot
    if not in_range or not torch.equal(received, expected.long()):
        raise ConstraintError(
            "expert_ids",
            f"such that {int(expected.sum())} rows are due here, while {len(slot)} came, not one for each",
            "must be the ids that dispatch was called with, with the same mask",
            "pass the expert_ids, x_active_mask and assist_info_for_combine of one dispatch",
        )


def _sizes(rows: torch.Tensor, layout: Layout, given: Mapping[str, Any], group: int = 0) -> dict[str, int]:
    """What must agree; `group` is 0 for the expert-parallel group, 1 for the peers', each with its own numbers."""
    number = given["dispatch_number"]
    return {
        DISPATCH: UNKNOWN if number is None else int(number[group]),
        "hidden size of `expert_out`": layout.hidden,
        "dtype of `expert_out`": dtype_code(rows.dtype),
        "top-k of `expert_ids`": layout.top_k,
        "`num_experts`": given["moe_expert_num"],
        "`shared_expert_num`": layout.shared_experts,
        "`shared_expert_rank_num`": layout.shared_ranks,
        "`comm_quant_mode`": given["comm_quant_mode"],
        "tokens per rank times ranks (`global_bs`)": layout.global_bs,
        "`zero_expert_num`": given["zero_expert_num"],
        "`copy_expert_num`": given["copy_expert_num"],
        "`const_expert_num`": given["const_expert_num"],
        "presence of `x_active_mask`": given["x_active_mask"] is not None,
        "tensor-parallel world size": given["tp_world_size"],
        "digest of `elastic_info`": digest((layout.num_experts, *layout.survivors)),
    }
