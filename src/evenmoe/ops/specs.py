"""Tensors as the contract room sees them: shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evenmoe.contract.tensor_spec import TensorSpec


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def specs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor replaced by its spec."""
    return {name: spec_of(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
