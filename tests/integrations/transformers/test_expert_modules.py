"""Experts are found by the model's own layer numbers, or it is said why not."""

from __future__ import annotations

import pytest
import torch

from evenmoe.errors import ConstraintError
from tests.integrations.transformers.models import dense, et


def test_stacks_with_the_same_numbers_are_told_apart():
    two = torch.nn.ModuleDict({"text": dense().model, "vision": dense().model})
    with pytest.raises(
        ConstraintError, match=r"experts of layer 0 in 'text\.layers\.0\.mlp\.experts', 'vision\.layers\.0"
    ):
        et.experts_of(two)
    assert [found.name for found in et.experts_of(two, named="vision")] == [
        f"vision.layers.{layer}.mlp.experts" for layer in range(2)
    ]
    with pytest.raises(ConstraintError, match="named 'audio', in which nothing holds routed experts"):
        et.experts_of(two, named="audio")


def test_a_block_alone_has_no_layer_number():
    with pytest.raises(ConstraintError, match=r"experts in 'mlp\.experts': it must number its layers"):
        et.experts_of(dense().model.layers[0])
