"""Memory of one rank: windows in turn, and tensors whose memory is used again when nobody holds them."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from evenmoe.transport.arena import Arena

PAGE = 4096


def make(pages: int = 64, start: int = PAGE) -> tuple[np.ndarray, Arena]:
    memory = np.zeros((pages + 1) * PAGE, np.uint8)
    return memory, Arena(memory, start, start + pages * PAGE)


def test_windows_lie_apart_and_are_filled_from_their_beginning():
    memory, arena = make()
    spans = []
    for number in range(4):
        arena.open_window(number)
        first = arena.take(100)
        second = arena.take(7)
        assert second >= first + 100
        assert first % 64 == second % 64 == 0
        arena.write(second, np.arange(7, dtype=np.uint8))
        assert memory[second : second + 7].tolist() == list(range(7))
        spans.append((first, second))
    assert spans[0] == spans[2] != spans[1] == spans[3]
    kept = arena.keep((10,), torch.int8)
    assert arena.offset_of(kept) > max(second for _, second in spans)


def test_a_window_that_is_full_is_an_error():
    _, arena = make()
    arena.open_window(0)
    arena.take(16 * PAGE)
    with pytest.raises(MemoryError, match="1 bytes do not fit into shared memory beside what an exchange has there"):
        arena.take(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 0)])
def test_what_is_kept_has_its_shape(dtype, shape):
    memory, arena = make()
    tensor = arena.keep(shape, dtype)
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    if tensor.numel():
        offset = arena.offset_of(tensor)
        tensor.view(-1).view(torch.uint8).fill_(7)
        size = tensor.numel() * tensor.element_size()
        assert memory[offset : offset + size].tolist() == [7] * size
    assert arena.offset_of(torch.zeros(3)) == -1


def test_memory_is_used_again_when_the_last_view_is_gone():
    _, arena = make()
    first = arena.keep((1,), torch.int8)
    offset, view = arena.offset_of(first), first.view(torch.uint8)[:]
    second = arena.keep((5000,), torch.int8)
    del first
    assert arena.offset_of(arena.keep((1,), torch.int8)) > arena.offset_of(second)
    del view
    again = arena.keep((4096,), torch.uint8)
    assert arena.offset_of(again) == offset
    with pytest.raises(MemoryError, match="131072 bytes do not fit into shared memory beside what is held there"):
        arena.keep((32 * PAGE,), torch.int8)


def test_what_is_held_never_overlaps():
    choose = random.Random(5)
    _, arena = make(pages=4000)
    held: list[torch.Tensor] = []
    for _ in range(600):
        if held and choose.random() < 0.5:
            held.pop(choose.randrange(len(held)))
        held.append(arena.keep((choose.choice([1, 100, 4096, 4097, 20_000]),), torch.uint8))
        held = held[-40:]
        spans = sorted((arena.offset_of(tensor), tensor.numel()) for tensor in held)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    del held[:]
    assert arena.offset_of(arena.keep((1,), torch.uint8)) == PAGE + 2000 * PAGE
