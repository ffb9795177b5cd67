"""Numbers written in text, to arrays, without an object for each of them."""

from __future__ import annotations

import json

import numpy as np

_BLOCK_BYTES = 1 << 16  # of text at a time: 64 KiB make at most 32,768 Python numbers, 1 MB


def parse_numbers(text: bytes) -> np.ndarray:
    """Comma-separated JSON numbers as int64, or float64 if one has a point or an exponent.

    Raises:
        ValueError: naming what is no number, does not fit, or is not finite.

    >>> parse_numbers(b"1, 2,3").tolist(), parse_numbers(b"1,2.5").tolist()
    ([1, 2, 3], [1.0, 2.5])
    """
    real = any(mark in text for mark in (b".", b"e", b"E"))
    values = np.empty(text.count(b",") + 1, np.float64 if real else np.int64)
    filled, start = 0, 0
    while start <= len(text):
        end = len(text)
        if end - start > _BLOCK_BYTES:
            end = text.find(b",", start + _BLOCK_BYTES, start + 2 * _BLOCK_BYTES)
            if end < 0:
                end = len(text) if len(text) - start < 2 * _BLOCK_BYTES else -1
        if end < 0:
            raise ValueError("a number of more than 64 KiB")
        block = text[start:end].decode("ascii")
        numbers: list = []
        try:
            numbers = json.loads(f"[{block}]") if block.strip() else [None]
            part = np.array(numbers, values.dtype)
        except OverflowError:
            raise ValueError(f"{_culprit(numbers)}, which does not fit 64 bits") from None
        except (ValueError, TypeError):
            raise ValueError(f"{_culprit(block.split(','))!r}, which is no number") from None
        if real and not np.isfinite(part).all():
            raise ValueError("a number beyond float64's range")
        values[filled : filled + len(part)] = part
        filled += len(part)
        start = end + 1
    return values


def _culprit(parts: list) -> object:
    for part in parts:
        try:
            np.array(json.loads(part) if isinstance(part, str) else part, np.float64 if "." in str(part) else np.int64)
        except (ValueError, TypeError, OverflowError):
            return part.strip()[:40] if isinstance(part, str) else str(part)[:40]
    return ""
