"""Memory for large results, used again when nobody holds a tensor over it any more.

The system maps new memory page by page as it is first written, which costs more than the copy that writes it: 28 ms for
58 MB. Threads of one process wait for each other while it does so.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from math import prod

import numpy as np
import torch

from evenmoe.transport.segment import Octets

# Bytes from which memory is kept: below, the allocators of torch and of the C library do so themselves.
LARGE = 1 << 22
_FREE = 4  # blocks that are kept while nobody holds them: of dispatch and combine, and of what comes next


class Pool:
    """The memory of one rank; not for threads that share it.

    >>> pool = Pool()
    >>> first = pool.take((1 << 11, 1 << 10), torch.float32)
    >>> address = first.data_ptr()
    >>> second = pool.take((1 << 11, 1 << 10), torch.float32)
    >>> second.data_ptr() == address  # it is held
    False
    >>> del first
    >>> pool.take((1 << 10, 1 << 10), torch.float64).data_ptr() == address
    True
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[Octets, weakref.ref[Octets]]] = []  # memory, and what is held of it; the oldest first

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, filled: int | None = None) -> torch.Tensor:
        """A tensor of at least `LARGE` bytes.

        Args:
            filled: bytes in front that the caller is going to write, behind which there are zeros. None for an
                uninitialized tensor.
        """
        size = prod(shape) * dtype.itemsize
        free = [at for at, (_, held) in enumerate(self._blocks) if held() is None]
        fitting = [at for at in free if size <= len(self._blocks[at][0]) <= 2 * size]
        if fitting:
            memory = self._blocks.pop(fitting[-1])[0]
        else:
            for at in reversed(free[: max(0, len(free) - _FREE + 1)]):
                del self._blocks[at]
            memory = np.empty(size + size // 8, np.uint8)  # an eighth more, since loads drift
        array = memory[:size]
        if filled is not None:
            clear(array, filled, shared=False)
        self._blocks.append((memory, weakref.ref(array)))
        return torch.from_numpy(array).view(dtype).view(shape)


_REMOVE = 9  # MADV_REMOVE of Linux, which mmap does not name
_advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _advise is not None:
    _advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def clear(memory: Octets, start: int, shared: bool) -> None:
    """Make zeros of what lies behind `start`, by giving whole pages back: those never written cost nothing.

    Args:
        memory: uint8 (n,), contiguous, of which nobody else holds any page.
        shared: whether it is shared between processes.

    >>> memory = np.ones(3 * 4096 + 100, np.uint8)
    >>> clear(memory, 10, shared=False)
    >>> memory[:10].sum(), memory[10:].sum()
    (np.uint64(10), np.uint64(0))
    """
    address, page = memory.ctypes.data, mmap.PAGESIZE
    first = min(len(memory), -(-(address + start) // page) * page - address)
    last = max(first, (address + len(memory)) // page * page - address)
    memory[start:first], memory[last:] = 0, 0
    if last > first:
        how = _REMOVE if shared else getattr(mmap, "MADV_DONTNEED", None)
        if _advise is None or how is None or _advise(address + first, last - first, how):
            memory[first:last] = 0
