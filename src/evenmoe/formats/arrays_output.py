"""One array as the bytes of .pt, .npy or .npz."""

from __future__ import annotations

import io

import numpy as np

from evenmoe.io.torch_file import torch_bytes


def array_bytes(array: np.ndarray, container: str) -> bytes:
    """`array` as a .pt of one tensor, or as .npy."""
    if container == "pt":
        return torch_bytes(array)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def arrays_bytes(arrays: dict[str, np.ndarray], container: str) -> bytes:
    """Named arrays as a .pt dictionary, or as .npz."""
    if container == "pt":
        return torch_bytes(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
