"""Memory that is used again: never while somebody holds it, and not more of it than was asked for."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.transport.pool import LARGE, Pool, clear


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=30))
def test_nobody_finds_other_values_in_what_he_holds(steps):
    """Each step puts a new tensor in one of six places, and so lets go of what was there."""
    pool, held = Pool(), {}
    for number, (place, times) in enumerate(steps):
        tensor = pool.take((times, LARGE), torch.int8)
        tensor[:, ::4096] = number % 100
        held[place] = tensor, number % 100
        assert all((kept[:, ::4096] == value).all() for kept, value in held.values())
    free = sum(used() is None for _, used in pool._blocks)
    assert free <= 5
    assert len(pool._blocks) <= free + 6


def test_any_part_keeps_the_memory():
    pool = Pool()
    part = pool.take((LARGE,), torch.uint8).view(torch.float32)[5:6]
    address = part.data_ptr() - 20
    other = pool.take((LARGE,), torch.uint8)
    assert other.data_ptr() != address
    del part
    assert pool.take((LARGE // 4,), torch.float32).data_ptr() == address


def test_small_requests_do_not_take_large_blocks():
    pool = Pool()
    address = pool.take((9 * LARGE,), torch.uint8).data_ptr()
    assert pool.take((LARGE,), torch.uint8).data_ptr() != address


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 9000, 20000])
@pytest.mark.parametrize("shift", [0, 1, 4095])
@pytest.mark.parametrize("shared", [False, True])
def test_only_what_lies_behind_is_cleared(start, shift, shared):
    whole = np.frombuffer(mmap.mmap(-1, 30000), np.uint8) if shared else np.zeros(30000, np.uint8)
    whole.fill(7)
    memory = whole[shift : shift + 20000]
    clear(memory, start, shared=shared)
    assert (memory[:start] == 7).all()
    assert (memory[start:] == 0).all()
    assert (whole[:shift] == 7).all()
    assert (whole[shift + 20000 :] == 7).all()


def test_rows_that_are_not_filled_are_zeros_whatever_the_memory_held():
    pool = Pool()
    for filled in (0, 3, 1, 4):
        tensor = pool.take((4, LARGE), torch.int8, filled * LARGE)
        assert not tensor[filled:].any()
        tensor.fill_(9)
        address = tensor.data_ptr()
        del tensor
    assert pool.take((4, LARGE), torch.int8).data_ptr() == address
