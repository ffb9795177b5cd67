"""Large new tensors on a CPU, out of numpy's allocator: it asks for huge pages, so that writing to them first costs a
third less of a dispatch, and its zeros are the system's own, which cost nothing until written.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch

_LARGE = 1 << 22  # bytes, from which numpy asks for huge pages; torch's own allocator serves the others as well


def empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of `shape`, with dtype and device of `like`."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _LARGE:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(size, np.uint8)).view(like.dtype).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
