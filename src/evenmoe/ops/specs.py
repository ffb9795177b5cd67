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


def refuse_other_types(arguments: Mapping[str, Any]) -> None:
    """Sequences and arrays where a tensor belongs.

    Raises:
        UnsupportedTypeError: naming the first.
    """
    for name, value in arguments.items():
        if isinstance(value, list | tuple) or hasattr(value, "__array_interface__"):
            raise UnsupportedTypeError(name, f"a {type(value).__name__}", "must be a torch.Tensor", "use torch.tensor")
