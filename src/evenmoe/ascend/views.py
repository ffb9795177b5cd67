"""Whether the memory of a tensor will do: there at all, an output's elements apart, and as the first stage saw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.operator import spec_of


def specs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor replaced by its spec."""
    return {name: spec_of(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def check_no_overlap(argument: str, shape: Sequence[int], strides: Sequence[int]) -> None:
    """Refuses an output that has two elements at one place: sorted by stride, each dimension steps over all smaller.

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
    """Refuses tensors that have no memory, and outputs that overlap.

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
    """Refuses tensors of another shape or dtype than the first stage checked; `specs` are the ones of then.

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
