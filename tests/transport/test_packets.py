"""Rows that were received: in one buffer between heads, or where each source keeps them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenmoe.transport.packets import Incoming

NONE = torch.zeros(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_rows_of_many_sources_are_those_of_one(dtype, shape):
    parts = [torch.randint(0, 2, (n, *shape)).to(dtype) for n in (4, 0, 2)]
    rows, at = np.array([3, 0, 2]), torch.tensor([3, 0, 0, 1, 0])
    many = Incoming(parts[0], rows, at, NONE, np.array([part.data_ptr() for part in parts]))
    one = Incoming(torch.cat(parts), rows, torch.tensor([3, 0, 0, 5, 4]), NONE)
    assert many.first.tolist() == one.first.tolist() == [0, 3, 3]
    for which in (None, torch.tensor([4, 4, 1, 0]), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(many.take(which), one.take(which))
        assert many.take(which).shape == one.take(which).shape
        out = torch.zeros_like(one.take(which))
        assert many.take(which, out) is out
        assert torch.equal(out, one.take(which))


def test_addresses_are_those_of_the_rows():
    parts = [torch.zeros((4, 3)), torch.zeros((2, 3))]
    base, at, rows = np.array([part.data_ptr() for part in parts]), torch.tensor([3, 1, 0]), np.array([1, 2])
    many = Incoming(parts[0], rows, at, NONE, base)
    assert many.addresses().tolist() == [parts[0][3].data_ptr(), parts[1][1].data_ptr(), parts[1][0].data_ptr()]
    one = Incoming(parts[0], rows, at, NONE)
    assert one.addresses().tolist() == [parts[0][row].data_ptr() for row in (3, 1, 0)]
    assert one.addresses(torch.tensor([[2, -1]])).tolist() == [parts[0].data_ptr(), 0]


@pytest.mark.parametrize("which", [-2, 3])
def test_a_row_that_has_not_come_is_an_error(which):
    came = Incoming(torch.zeros((4, 3)), np.array([1, 2]), torch.tensor([3, 1, 0]), NONE)
    with pytest.raises(IndexError, match="a row that has not come"):
        came.addresses(torch.tensor([which]))


def test_other_numbers_of_rows_than_came_are_an_error():
    came = Incoming(torch.zeros((4, 3)), np.array([1, 1]), torch.tensor([3, 1, 0]), NONE)
    with pytest.raises(IndexError, match="other numbers of rows than there are"):
        came.addresses()
