"""Rows that were received: in one buffer between heads, or where each source keeps them."""

from __future__ import annotations

import pytest
import torch

from evenmoe.transport.packets import Incoming

NONE = torch.zeros(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_rows_of_many_sources_are_those_of_one(dtype, shape):
    parts = [torch.randint(0, 2, (n, *shape)).to(dtype) for n in (4, 0, 2)]
    rows, at = [3, 0, 2], torch.tensor([3, 0, 0, 1, 0])
    many = Incoming(parts, rows, at, NONE)
    one = Incoming([torch.cat(parts)], rows, torch.tensor([3, 0, 0, 5, 4]), NONE)
    assert many.first == one.first == [0, 3, 3]
    for which in (None, torch.tensor([4, 4, 1, 0]), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(many.take(which), one.take(which))
        assert many.take(which).shape == one.take(which).shape
        out = torch.zeros_like(one.take(which))
        assert many.take(which, out) is out
        assert torch.equal(out, one.take(which))


def test_addresses_are_those_of_the_rows():
    parts = [torch.zeros((4, 3)), torch.zeros((2, 3))]
    many = Incoming(parts, [1, 2], torch.tensor([3, 1, 0]), NONE)
    assert many.addresses().tolist() == [parts[0][3].data_ptr(), parts[1][1].data_ptr(), parts[1][0].data_ptr()]
    one = Incoming(parts[:1], [1, 2], torch.tensor([3, 1, 0]), NONE)
    assert one.addresses().tolist() == [parts[0][row].data_ptr() for row in (3, 1, 0)]
