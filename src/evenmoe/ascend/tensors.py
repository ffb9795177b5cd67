"""The caller's tensors: what the two-stage calls ask of their memory, and what the operators write into them.

What an operator leaves alone stays untouched, as on the device (§2.3, §3.4).

Ascend's dispatch has no output that tells one call from another. So the number of the call is remembered for the tensor
that combine needs of it, for as long as that lives and nobody else writes to it. A copy, or the same memory behind
another tensor (as in C++), is not known; then only the operator's own values are compared between the ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.exchange import active_tokens
from evenmoe.ops.numerics import DYNAMIC_INT8
from evenmoe.ops.operator import spec_of


def specs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor replaced by its spec."""
    return {name: spec_of(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


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
    """Check that the tensors still have the shapes and dtypes that the first stage saw, `specs`.

    Raises:
        ConstraintError: one was resized, or replaced by another.

    >>> check_unchanged({"out": TensorSpec((2,), "int32")}, {"out": torch.zeros(3, dtype=torch.int32)})
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `out` is int32 (3,): it must stay as the first stage saw it, int32 (2,); call the \
first stage again.
    """
    for name, tensor in tensors.items():
        now = None if tensor is None else spec_of(tensor)
        if now != specs[name]:
            raise ConstraintError(
                name, now, f"must stay as the first stage saw it, {specs[name]}", "call the first stage again"
            )


_numbers = WeakIdKeyDictionary()  # assist info -> (its version, number)
_lock = threading.Lock()


def remember(assist_info: torch.Tensor | None, number: torch.Tensor) -> None:
    """Keep `number`, the last output of `torch.ops.evenmoe.dispatch`, for what its assist info was written to."""
    assert assist_info is not None, "the first stage raises for null outputs"
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
        assert output is not None, "the first stage raises for null outputs"
        output[active] = result[active]


def _write(outputs: Outputs, name: str, values: torch.Tensor) -> None:
    output = outputs[name]
    assert output is not None, "the first stage raises for null outputs"
    output[: len(values)] = values


WRITERS: dict[str, Writer] = {
    "update_expert": _write_update_expert,
    "dispatch": _write_dispatch,
    "combine": _write_combine,
    "combine_add_rms_norm": _write_combine_add_rms_norm,
}
"""By registered operator: (outputs, results of the operator, layout that took part, its arguments)."""
