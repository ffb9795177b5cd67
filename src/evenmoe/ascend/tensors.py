"""The caller's tensors: what the two-stage calls ask of their memory, and what the operators write into them.

What an operator leaves alone stays untouched, as on the device (§2.3, §3.4).

Ascend's dispatch has no output that tells one call from another. So the number of the call is remembered for the tensor
that combine needs of it, for as long as that lives and nobody else writes to it. A copy, or the same memory behind
another tensor (as in C++), is not known; then only the operator's own values are compared between the ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from evenmoe.contract.calls import CombineCall, CombineV1Call, DispatchCall, DispatchV1Call, UpdateExpertCall
from evenmoe.contract.half_calls import (
    CombineSetupCall,
    CombineTeardownCall,
    DispatchSetupCall,
    DispatchTeardownCall,
    HalfCall,
)
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.dispatch_halves import message_width, rows_of
from evenmoe.ops.exchange import active_tokens, route
from evenmoe.ops.numerics import DYNAMIC_INT8
from evenmoe.ops.operator import Call, spec_of


def check_no_overlap(argument: str, shape: Sequence[int], strides: Sequence[int]) -> None:
    """Check that no two elements share memory: sorted by stride, each dimension must step over all smaller ones.

    Raises:
        ConstraintError: they may share memory.

    >>> check_no_overlap("out", (2, 3), (1, 2))  # transposed
    >>> check_no_overlap("out", (2, 3), (0, 1))
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `out` is (2, 3) with strides (0, 1): it must not write one place twice; use larger \
strides.
    """
    reach = 1
    for step, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and step < reach:
            value = f"{tuple(shape)} with strides {tuple(strides)}"
            raise ConstraintError(argument, value, "must not write one place twice", "use larger strides")
        reach += (size - 1) * step


def check_memory(arguments: Mapping[str, object], outputs: Sequence[str]) -> None:
    """Check that every tensor has memory, and that no output overlaps itself.

    Args:
        arguments: {name: value}; whatever is no tensor is passed over.
        outputs: the names of those that are written.

    Raises:
        UnsupportedTypeError: a tensor without memory.
        ConstraintError: an output with two elements at one place.
    """
    for name, tensor in arguments.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.device.type == "meta":
            raise UnsupportedTypeError(name, "on the device meta", "must have memory", "make it on the device cpu")
        if name in outputs and tensor.numel():
            check_no_overlap(name, tensor.shape, tensor.stride())


def check_unchanged(specs: Mapping[str, TensorSpec | None], tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Check that the tensors have the shapes and dtypes that the first stage saw, `specs` by name.

    Raises:
        ConstraintError: one was resized, or replaced by another.
    """
    for name, tensor in tensors.items():
        before, now = specs[name], None if tensor is None else spec_of(tensor)
        if now != before:
            raise ConstraintError(
                name, now, f"must stay as the first stage saw it, {before}", "call the first stage again"
            )


_numbers = WeakIdKeyDictionary()  # assist info -> (its version, number)
_lock = threading.Lock()


def remember(assist_info: torch.Tensor, number: torch.Tensor) -> None:
    """Keep `number`, the last output of `torch.ops.evenmoe.dispatch`, for what its assist info was written to."""
    with _lock:
        _numbers[assist_info] = _version(assist_info), number


def number_of(assist_info: object) -> torch.Tensor | None:
    """Return the number of the dispatch that wrote `assist_info`, None if it is not known."""
    if not isinstance(assist_info, torch.Tensor):
        return None
    with _lock:
        known = _numbers.get(assist_info)
    return known[1] if known is not None and known[0] == _version(assist_info) else None


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


Outputs = Mapping[str, torch.Tensor | None]


def write_outputs(call: Call, outputs: Outputs, results: Sequence[torch.Tensor], layout: Layout | None) -> None:
    """Write what an operator computed into the caller's tensors.

    Args:
        outputs: by name, in the operator's order.
        results: the outputs of the registered operator.
        layout: of the ranks that took part; None for update expert.
    """
    if isinstance(call, DispatchCall):
        assert layout is not None
        _write_dispatch(call, outputs, results, layout)
    elif isinstance(call, CombineCall):
        mask = None if isinstance(call, CombineV1Call) else call.x_active_mask
        active = active_tokens(len(call.expert_ids), mask, call.expert_ids.device)
        for name, result in zip(outputs, results, strict=True):
            _given(outputs, name)[active] = result[active]
    elif isinstance(call, HalfCall):
        assert layout is not None
        _write_half(call, outputs, results, layout)
    elif isinstance(call, UpdateExpertCall):
        ids, mask = results
        _write(outputs, "balanced_expert_ids", ids)
        if call.expert_scales is not None:  # without pruning the mask is not written (§1.5)
            _write(outputs, "balanced_active_mask", mask)


def _write_dispatch(
    call: DispatchCall[torch.Tensor], outputs: Outputs, results: Sequence[torch.Tensor], layout: Layout
) -> None:
    expand_x, dynamic_scales, origin, token_nums, ep_recv_counts, tp_recv_counts, expand_scales, number = results
    pairs = layout.ep * layout.local_experts
    own = int(ep_recv_counts[pairs - 1])
    rows, counted = own, pairs
    if layout.tp == 2:
        rows, counted = int(tp_recv_counts.sum()), 2 * pairs
        _write(outputs, "tp_recv_counts", tp_recv_counts)
    _write(outputs, "expand_x", expand_x[:rows])
    if call.quant_mode == DYNAMIC_INT8:
        _write(outputs, "dynamic_scales", dynamic_scales[:rows])
    room = outputs["expand_scales"]
    first_version = isinstance(call, DispatchV1Call)
    sent = call.sends_expert_scales and not layout.is_shared and not first_version
    if sent and room is not None and room.dim() == 1 and len(room) >= own:
        room[:own] = expand_scales[:own]
    name = "expand_idx" if first_version else "assist_info_for_combine"
    _write(outputs, name, origin if first_version else origin[: 3 * own])
    remember(_given(outputs, name), number)
    _write(outputs, "expert_token_nums", token_nums[: layout.local_experts])
    _write(outputs, "ep_recv_counts", ep_recv_counts[:counted])


def _write_half(
    call: HalfCall[torch.Tensor], outputs: Outputs, results: Sequence[torch.Tensor], layout: Layout
) -> None:
    """What the kernels write (§14): messages and rows as many as there are, and no quantized rows of combine."""
    if isinstance(call, DispatchSetupCall):
        message, index, commands = results
        rows = rows_of(route(call.expert_ids, layout, call.x_active_mask), layout)
        width = message_width(layout.hidden, call.quant_mode == DYNAMIC_INT8)
        _given(outputs, "y")[rows, :width] = message[rows, :width]
        active = active_tokens(len(call.expert_ids), call.x_active_mask, index.device)
        sent = active[:, None].expand(call.expert_ids.shape).flatten()
        _given(outputs, "expand_idx")[sent] = index[sent]
        _write(outputs, "comm_cmd_info", commands)
    elif isinstance(call, DispatchTeardownCall):
        expand_x, dynamic_scales, assist, token_nums = results
        pairs = layout.ep * layout.local_experts
        rows = int(assist[pairs - 1])
        _write(outputs, "expand_x", expand_x[:rows])
        if call.quant_mode == DYNAMIC_INT8:
            _write(outputs, "dynamic_scales", dynamic_scales[:rows])
        _write(outputs, "assist_info_for_combine", assist[:pairs])
        _write(outputs, "expert_token_nums", token_nums)
    elif isinstance(call, CombineSetupCall):
        _write(outputs, "comm_cmd_info", results[1])
    elif isinstance(call, CombineTeardownCall):
        active = active_tokens(len(call.expert_ids), call.x_active_mask, call.expert_ids.device)
        _given(outputs, "x_out")[active] = results[0][active]


def _write(outputs: Outputs, name: str, values: torch.Tensor) -> None:
    _given(outputs, name)[: len(values)] = values


def _given(outputs: Outputs, name: str) -> torch.Tensor:
    output = outputs[name]
    assert output is not None, "the first stage raises for null outputs"
    return output
