"""Blocks of rows behind their heads: where everything lies, and that it comes out as it went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.transport.agreement import FAILED
from evenmoe.transport.blocks import HEAD_BYTES, Blocks, failure_in, fill, heads_and_numbers, heads_for


def test_positions_in_blocks():
    blocks = Blocks([0, 3, 0], [2, 0, 3], row_bytes=128)
    assert (blocks.lengths, blocks.starts, blocks.first, blocks.total) == ([4, 3, 5], [0, 4, 7], [2, 7, 9], 12)
    assert blocks.positions().tolist() == [2, 3, 9, 10, 11]


def round_trip(dtype: torch.dtype, each: list[tuple[int, int]], width: int) -> None:
    """Blocks of so many numbers and rows for each rank, filled in and taken out again."""
    numbers, rows = [n for n, _ in each], [n for _, n in each]
    blocks = Blocks(numbers, rows, width * dtype.itemsize)
    source = torch.arange(50 * width).reshape(50, width).to(dtype)
    index, along = torch.arange(sum(rows)) * 7 % 50, torch.arange(sum(numbers), dtype=torch.int32)
    buffer = torch.empty((blocks.total, width), dtype=dtype)
    fill(buffer, blocks, heads_for(blocks, 9), source, index, along)
    heads, found = heads_and_numbers(buffer, blocks)
    assert heads[:, 0].tolist() == [9] * len(each)
    assert heads[:, 1].tolist() == blocks.lengths
    assert failure_in(heads) is None
    assert torch.equal(found, along)
    assert torch.equal(buffer[blocks.positions()], source[index])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float64])
@given(
    each=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4), width=st.integers(1, 300)
)
def test_what_is_filled_in_is_found_there(dtype, each, width):
    round_trip(dtype, each, width)


def test_a_failure_is_told_in_the_heads():
    blocks = Blocks([0, 0], [0, 1], HEAD_BYTES)
    assert failure_in(heads_for(blocks, 1, ValueError("no"))) == (0, "ValueError: no", False)
    heads = heads_for(blocks, 1, ConstraintError("x", 1, "must be 2", "use 2"))
    heads[0, 2] = 0
    assert heads[1, 2] not in (0, FAILED)
    assert failure_in(heads) == (1, "`x` is 1: it must be 2; use 2.", True)
