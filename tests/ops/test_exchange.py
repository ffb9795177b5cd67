"""The order of assignments and rows, against torch's own sorting and against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.ops.exchange import received_order, stable_order

BOUNDS = [1, 2, 5, 300, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 20]  # about the end of 16 bits


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_keys_are_sorted_as_torch_sorts_them(bound, count, dtype):
    keys = torch.randint(bound, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)
    if count:
        keys[-1] = bound - 1
    order, want = stable_order(keys, bound), torch.sort(keys, stable=True).indices
    assert order.dtype == torch.int64
    assert torch.equal(order, want)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)))
def test_rows_by_source_become_rows_by_expert(counts):
    """`counts[s][e]` rows of source s for expert e come by source, then expert."""
    came = [(e, s, i) for s, row in enumerate(counts) for e, n in enumerate(row) for i in range(n)]
    order, source = received_order(torch.tensor(counts))
    assert [came[position] for position in order.tolist()] == sorted(came)
    assert source.tolist() == [s for _, s, _ in sorted(came)]
