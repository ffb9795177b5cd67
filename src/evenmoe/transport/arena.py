"""One rank's part of the memory that its group shares: two windows for what it posts, and memory that is kept longer.

A window holds what one exchange shows to the other ranks; the next one uses the other window, so that slower ranks may
still read the last. What is kept, as the rows that a dispatch returns, belongs to whoever holds a tensor over it, and
is free again when the last such tensor is gone. Nothing is reserved: parts of the memory that were never written cost
nothing, and those that were are used again first.
"""

from __future__ import annotations

import weakref
from math import prod

import numpy as np
import torch

from evenmoe.transport.packets import copy_memory
from evenmoe.transport.pool import clear
from evenmoe.transport.segment import Octets

_ALIGNED = 64  # bytes of a cache line, and enough for every dtype
_PAGE = 4096


class Arena:
    """The part of one rank.

    Args:
        memory: uint8 (n,), all of the group's. start, stop: of this rank's part, multiples of a page.
    """

    def __init__(self, memory: Octets, start: int, stop: int) -> None:
        self._memory, self._start, self._stop = memory, start, stop
        self._address = memory.ctypes.data
        quarter = (stop - start) // 4 // _PAGE * _PAGE
        self._windows = (start, start + quarter)
        self._window_size, self._kept_from = quarter, start + 2 * quarter
        self._cursor = self._window_stop = start
        self._kept: list[tuple[int, int, weakref.ref[Octets]]] = []  # (start, stop, array), by start

    def open_window(self, number: int) -> None:
        """Begin to fill one of the two windows, that of an even or an odd number, anew."""
        self._cursor = self._windows[number % 2]
        self._window_stop = self._cursor + self._window_size

    def take(self, size: int) -> int:
        """The offset, in all of the memory, of as many bytes of the open window.

        Raises:
            MemoryError: the window is full.
        """
        offset = self._cursor
        if offset + size > self._window_stop:
            raise MemoryError(f"{size} bytes do not fit into shared memory beside what an exchange has there already")
        self._cursor = -(-(offset + size) // _ALIGNED) * _ALIGNED
        return offset

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype, filled: int | None = None) -> torch.Tensor:
        """A tensor which the other ranks can read; its memory is used again when nobody holds it.

        Args:
            filled: bytes in front that the caller is going to write, behind which there are zeros. None for an
                uninitialized tensor.

        Raises:
            MemoryError: there is no room beside what is held.
        """
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        start, position = self._kept_from, 0
        self._kept = [kept for kept in self._kept if kept[2]() is not None]
        for position, (taken, after, _) in enumerate((*self._kept, (self._stop, self._stop, None))):  # noqa: B007
            if taken - start >= size:
                break
            start = -(-after // _PAGE) * _PAGE
        else:
            raise MemoryError(f"{size} bytes do not fit into shared memory beside what is held there")
        array = self._memory[start : start + size]
        if filled is not None:
            clear(array, filled, shared=True)
        self._kept.insert(position, (start, start + size, weakref.ref(array)))
        return torch.from_numpy(array).view(dtype).view(shape)

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where in all of the memory a contiguous tensor lies; −1 if it is not in this rank's kept part."""
        offset = tensor.data_ptr() - self._address
        size = tensor.numel() * tensor.element_size()
        return offset if self._kept_from <= offset and offset + size <= self._stop else -1

    def at(self, offset: int, size: int) -> Octets:
        """The bytes of any rank at an offset."""
        return self._memory[offset : offset + size]

    def address(self, offset: int) -> int:
        """Where in this process an offset lies."""
        return self._address + offset

    def write(self, offset: int, values: np.ndarray | torch.Tensor) -> None:
        """Write the bytes of a contiguous tensor or array."""
        if isinstance(values, np.ndarray):
            self._memory[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)
        elif values.numel():
            copy_memory(self._address + offset, values.data_ptr(), values.nbytes)
