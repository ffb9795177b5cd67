"""What each operator writes into the caller's outputs; the rest stays untouched, as on the device (§2.3, §3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from evenmoe.ascend.dispatch_numbers import remember
from evenmoe.contract.layout import Layout
from evenmoe.ops.exchange import active_tokens
from evenmoe.ops.numerics import DYNAMIC_INT8

Outputs = Mapping[str, torch.Tensor | None]
Writer = Callable[[Outputs, Any, Layout | None, Mapping[str, Any]], None]


def _write_update_expert(outputs: Outputs, results: Any, layout: Layout | None, given: Mapping[str, Any]) -> None:
    ids, mask = results
    _write(outputs, "balanced_expert_ids", ids)
    if given["expert_scales"] is not None:  # without pruning the mask is not written (§1.5)
        _write(outputs, "balanced_active_mask", mask)


def _write_dispatch(outputs: Outputs, results: Any, layout: Layout | None, given: Mapping[str, Any]) -> None:
    assert layout is not None
    expand_x, dynamic_scales, assist, token_nums, ep_recv_counts, tp_recv_counts, _, number = results
    pairs = layout.ep * layout.local_experts
    own = int(ep_recv_counts[pairs - 1])
    rows, counted = own, pairs
    if layout.tp == 2:
        rows, counted = int(tp_recv_counts.sum()), 2 * pairs
        _write(outputs, "tp_recv_counts", tp_recv_counts)
    _write(outputs, "expand_x", expand_x[:rows])
    if given["quant_mode"] == DYNAMIC_INT8:
        _write(outputs, "dynamic_scales", dynamic_scales[:rows])
    _write(outputs, "assist_info_for_combine", assist[: 3 * own])
    remember(outputs["assist_info_for_combine"], number)
    _write(outputs, "expert_token_nums", token_nums[: layout.local_experts])
    _write(outputs, "ep_recv_counts", ep_recv_counts[:counted])


def _write_combine(outputs: Outputs, results: Any, layout: Layout | None, given: Mapping[str, Any]) -> None:
    _write_active(outputs, {"x_out": results}, given)


def _write_combine_add_rms_norm(
    outputs: Outputs, results: Any, layout: Layout | None, given: Mapping[str, Any]
) -> None:
    _write_active(outputs, dict(zip(("y_out", "rstd_out", "x_out"), results, strict=True)), given)


def _write_active(outputs: Outputs, results: dict[str, torch.Tensor], given: Mapping[str, Any]) -> None:
    expert_ids = given["expert_ids"]
    active = active_tokens(expert_ids.shape[0], given["x_active_mask"], expert_ids.device)
    for name, result in results.items():
        output = outputs[name]
        assert output is not None, "the first stage refuses null outputs"
        output[active] = result[active]


def _write(outputs: Outputs, name: str, values: torch.Tensor) -> None:
    output = outputs[name]
    assert output is not None, "the first stage refuses null outputs"
    output[: len(values)] = values


WRITERS: dict[str, Writer] = {
    "update_expert": _write_update_expert,
    "dispatch": _write_dispatch,
    "combine": _write_combine,
    "combine_add_rms_norm": _write_combine_add_rms_norm,
}
"""By registered operator: (outputs, results of the operator, layout that took part, its arguments)."""
