"""Device memory and the views over it, against numpy and by counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.ascend.cann.tensors import BYTES_PER_DEVICE, Memory, TensorDescription, check_copy, describe_tensor, view
from evenmoe.ascend.status import AclError
from evenmoe.errors import ConstraintError, UnsupportedTypeError

INT32, ND = 3, 2
BLOCK = 64  # int32 elements

views = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4)


def block_of_numbers(memory: Memory) -> tuple[int, np.ndarray]:
    """Address of a block that holds 0…63, and an array over the same bytes."""
    address = memory.allocate(0, BLOCK * 4)
    found = memory.find(address)
    assert found is not None
    numbers = found[0].data.view(torch.int32).numpy()
    numbers[:] = np.arange(BLOCK)
    return address, numbers


@given(views, st.integers(0, 9))
def test_a_view_reads_the_places_that_shape_strides_and_offset_say(dims: list[tuple[int, int]], offset: int) -> None:
    memory = Memory()
    address, numbers = block_of_numbers(memory)
    shape, strides = tuple(size for size, _ in dims), tuple(step for _, step in dims)
    tensor = TensorDescription(shape, strides, offset, INT32, ND, address)
    places = np.full(shape, offset)
    for axis, step in enumerate(strides):
        places += step * np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    if places.size and places.max() >= BLOCK:
        with pytest.raises(UnsupportedTypeError, match=r"must have room for its \d+ bytes"):
            view(memory, "x", tensor, written=False)
        return
    np.testing.assert_array_equal(view(memory, "x", tensor, written=False).numpy(), numbers[places])
    distinct = len(np.unique(places)) == places.size
    try:
        written = view(memory, "x", tensor, written=True)
    except ConstraintError:
        # The check is by strides, so it may reject an odd layout without overlap, but never one that is nested.
        order = sorted((step, size) for size, step in dims if size > 1)
        nested = all(b >= a * n for (a, n), (b, _) in itertools.pairwise(order))
        assert not (distinct and nested and all(step for step, _ in order))
        return
    assert distinct, "an output whose elements overlap"
    written.fill_(-1)
    assert (numbers == -1).sum() == places.size


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.randoms())
def test_an_address_is_found_in_the_block_that_covers_it(sizes: list[int], random) -> None:
    memory = Memory()
    live = {memory.allocate(0, size): size for size in sizes}
    for address in random.sample(sorted(live), len(live) // 2):
        memory.free(address)
        del live[address]
    for address, size in live.items():
        for inside in (0, size - 1):
            found = memory.find(address + inside)
            assert found is not None
            assert (found[0].data.data_ptr(), found[1]) == (address, inside)
        after = memory.find(address + size)
        assert after is None or after[0].data.data_ptr() != address
        memory.check_room("x", address, size)
        with pytest.raises(AclError, match=f"must have room for {size + 1} bytes"):
            memory.check_room("x", address, size + 1)


def test_memory_that_was_freed_is_the_devices_again() -> None:
    memory = Memory()
    address = memory.allocate(3, 1000)
    with pytest.raises(AclError, match=f"{BYTES_PER_DEVICE - 1000} bytes that device 3 has left"):
        memory.allocate(3, BYTES_PER_DEVICE)
    memory.free(address)
    memory.free_device(3)
    with pytest.raises(AclError, match=f"{BYTES_PER_DEVICE} bytes that device 3 has left"):
        memory.allocate(3, BYTES_PER_DEVICE + 1)


def test_a_view_outlives_the_freeing_of_its_block() -> None:
    memory = Memory()
    address, _ = block_of_numbers(memory)
    tensor = view(memory, "x", TensorDescription((4,), (1,), 60, INT32, ND, address), written=False)
    memory.free(address)
    assert tensor.tolist() == [60, 61, 62, 63]


@pytest.mark.parametrize(("kind", "good"), [(0, "hh"), (1, "dh"), (2, "hd"), (3, "dd")])
def test_a_copy_is_checked_on_the_sides_that_kind_names(kind: int, good: str) -> None:
    memory = Memory()
    host = torch.arange(8, dtype=torch.uint8)
    other = torch.zeros(8, dtype=torch.uint8)
    for sides in ("hh", "dh", "hd", "dd"):
        destination = memory.allocate(0, 8) if sides[0] == "d" else other.data_ptr()
        source = memory.allocate(0, 8) if sides[1] == "d" else host.data_ptr()
        if sides == good:
            check_copy(memory, destination, 8, source, 8, kind).run()
        else:
            with pytest.raises(AclError):
                check_copy(memory, destination, 8, source, 8, kind)


def test_null_strides_mean_a_contiguous_view() -> None:
    tensor = describe_tensor([2, 3, 4], 3, INT32, None, 0, ND, [24], 1, 0)
    assert tensor.strides == (12, 4, 1)
