"""The demo's verdict where numbers cancel: what float32 cannot help doing is no bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evenmoe.cli.chain import compare, expect, make_layer, run_chain
from evenmoe.placement import default_placement


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**-24])
def test_a_residual_that_takes_the_shared_expert_away(scale, tp_size):
    """x = experts + shared − shared: float32 rounds the first sum, and nothing hides that in the second."""
    ep = 4 // tp_size
    ids = torch.tensor([[[rank % ep, (rank + 1) % ep]] * 3 for rank in range(4)])
    layer = make_layer(default_placement(1, ep, ep), 0, ids, tp_size, hidden=32, inner=16, seed=0)
    shared = 1000 * layer.shared
    layer = replace(layer, shared=shared, residual=-shared, scales=layer.scales * scale)
    result = compare(layer, run_chain(layer), expect(layer))
    assert 0.0 < result.largest_share <= 1.0
