"""The weighted sum of a token's rows in float32: the half of combine that stays at home (§3.4).

Shapes: Bs tokens, H hidden, K experts per token, Sn shared experts on ranks of their own, N rows received.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evenmoe.contract.layout import Layout
from evenmoe.ops.numerics import softmax_of_two, tree_sum
from evenmoe.ops.routing import active_tokens, sent_entries


def accumulate(
    layout: Layout, rows: torch.Tensor, place: torch.Tensor, given: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """§3.4 up to the final rounding: weighted rows in ascending k, then shared experts, then shared_expert_x.

    Each product is rounded to float32 before it is added; places without a row add nothing.

    Returns:
        float32 (Bs, H) sums; bool (Bs,) active tokens, whose sums count.
    """
    expert_ids, scales = given["expert_ids"], given["expert_scales"]
    num_tokens, top_k = expert_ids.shape
    active = active_tokens(num_tokens, given["x_active_mask"], expert_ids.device)
    home = sent_entries(expert_ids, layout, given["x_active_mask"])
    has_virtual = (given["zero_expert_num"] + given["copy_expert_num"] + given["const_expert_num"]) > 0
    total = torch.zeros((num_tokens, layout.hidden), dtype=torch.float32, device=rows.device)
    for tokens in chunks(num_tokens, layout.hidden, rows.device):
        part = total[tokens]
        for k in range(top_k):
            add_rows(part, rows, place[tokens, k], home[tokens, k], scales[tokens, k])
            if has_virtual:
                _add_virtual(part, tokens, k, layout, given)
        for e in range(layout.shared_experts):
            add_rows(part, rows, place[tokens, top_k + e], active[tokens])
        if given["shared_expert_x"] is not None:
            part += given["shared_expert_x"].reshape(num_tokens, layout.hidden)[tokens].float()
    return total, active


def add_rows(
    part: torch.Tensor,
    rows: torch.Tensor,
    place: torch.Tensor,
    present: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> None:
    """part[i] += weights[i] · rows[place[i]] where present[i]; the product rounded to float32 first.

    Args:
        part: float32 (n, H), changed in place.
        rows: (N, H) of any float dtype; N may be 0 when nothing is present.
        place: int64 (n,). What it holds where nothing is present does not matter.
        present: bool (n,).
        weights: float (n,), or None to add the rows as they are.
    """
    if bool(present.all()) and len(part):
        term = rows.index_select(0, place).float()
        part += term if weights is None else term.mul_(weights[:, None])
        return
    where = present.nonzero().flatten()
    if where.numel():
        term = rows.index_select(0, place[where]).float()
        part[where] += term if weights is None else term.mul_(weights[where, None])


def chunks(num_tokens: int, hidden: int, device: torch.device) -> list[slice]:
    """On a CPU, so few tokens at a time that their float32 rows stay in a core's cache (256 KiB); else all at once."""
    size = max(1, (1 << 16) // hidden) if device.type == "cpu" else max(1, num_tokens)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _add_virtual(part: torch.Tensor, tokens: slice, k: int, layout: Layout, given: Mapping[str, Any]) -> None:
    """Copy and const experts, computed where the token lives (§2.10, §3.4); zero experts add nothing."""
    ids = given["expert_ids"][tokens, k].long() - layout.num_experts - given["zero_expert_num"]
    mask = given["x_active_mask"]
    if mask is not None and mask.dim() == 2:
        ids = torch.where(mask[tokens, k], ids, -1)
    weights = given["expert_scales"][tokens, k, None]
    copies = given["copy_expert_num"]
    where = ((ids >= 0) & (ids < copies)).nonzero().flatten()
    if where.numel():
        part[where] += weights[where] * given["ori_x"][tokens][where].float()
    where = (ids >= copies).nonzero().flatten()
    if where.numel():
        which = ids[where] - copies
        x = given["ori_x"][tokens][where].float()
        first = tree_sum(given["const_expert_alpha_1"][which].float() * x)
        second = tree_sum(given["const_expert_alpha_2"][which].float() * x)
        p1, p2 = softmax_of_two(first, second)
        mixed = p1[:, None] * x + p2[:, None] * given["const_expert_v"][which].float()
        part[where] += weights[where] * mixed
