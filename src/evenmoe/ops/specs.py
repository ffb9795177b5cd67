"""Tensors as the contract room sees them: shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import UnsupportedTypeError


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def specs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor replaced by its spec."""
    return {name: spec_of(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def refuse_other_places(tensors: Mapping[str, Any]) -> None:
    """Refuse tensors whose values cannot be read where the call reads them; everything else passes.

    Raises:
        UnsupportedTypeError: a tensor is not dense, holds no values, or lies on another device than the first.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise UnsupportedTypeError(name, f"a {layout} tensor", "must be a dense tensor", "call to_dense()")
        if tensor.device.type == "meta":
            raise UnsupportedTypeError(
                name, "on the device meta", "must hold values", "pass a tensor on the device of the others"
            )
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise UnsupportedTypeError(
                name,
                f"on the device {tensor.device}",
                f"must be where `{first[0]}` is, on {first[1]}",
                f"move it with .to({str(first[1])!r})",
            )
