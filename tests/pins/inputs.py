"""The pins' inputs, in integers alone, so that they are the same on every machine and under every numpy."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

import evenmoe as em

IntArray = npt.NDArray[np.int64]


def integers(seed: int, bound: int, *shape: int) -> IntArray:
    """int64 of this shape, in 0…bound−1: the splitmix64 sequence that starts at `seed`."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        z = np.uint64(seed * 1_000_003) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(8)).astype(np.int64).reshape(shape) % bound


def skewed(seed: int, *shape: int) -> IntArray:
    """Loads of which a few experts have most, as real ones are: 1 / u with u uniform."""
    return 50 + 60_000 // (1 + integers(seed, 400, *shape))


def mild(seed: int, *shape: int) -> IntArray:
    """Loads between 600 and 1,400."""
    return 600 + integers(seed, 801, *shape)


def drifted(load: IntArray, seed: int) -> IntArray:
    """The same loads, each 40 % lower to 40 % higher."""
    return load * (600 + integers(seed, 801, *load.shape)) // 1000


def drifting(seed: int, windows: int, layers: int, experts: int) -> IntArray:
    """Windows of a skewed load that drifts around its mean."""
    return np.stack([drifted(skewed(seed, layers, experts), seed + 100 + window) for window in range(windows)])


def default_placement(layers: int, experts: int, slots: int, ranks: int) -> em.Placement:
    """Slot s holds expert s, and the slots behind the last expert begin anew."""
    return em.Placement(np.tile(np.arange(slots) % experts, (layers, 1)), ranks, num_experts=experts)


def distinct_ids(seed: int, tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """int64 (tokens, top_k), ids that differ within a token, low ones most often."""
    keys = integers(seed, 1 << 20, tokens, experts) * (1 + np.arange(experts))
    return torch.from_numpy(np.argsort(keys, axis=1, kind="stable")[:, :top_k].copy())


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in −4…4 with a fraction of twelve bits, rounded to the dtype."""
    return torch.from_numpy((integers(seed, 1 << 15, *shape) - (1 << 14)).astype(np.float64) / (1 << 12)).to(dtype)


def sha256(*parts: bytes | str | npt.NDArray | torch.Tensor) -> str:
    """One digest of texts, bytes, and arrays and tensors with their dtypes and shapes; every NaN counts alike."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            dtype = str(part.dtype).removeprefix("torch.")
            if part.is_floating_point():
                part = part.masked_fill(part.isnan(), torch.nan)
            content = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b""
            digest.update(f"{dtype}{tuple(part.shape)}".encode() + content)
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()
