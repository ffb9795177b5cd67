"""Numbers written in text, to arrays, without an object for each of them; and CSV, with or without a header line."""

from __future__ import annotations

import io
import json

import numpy as np

from evenmoe.io import DamagedFileError

_BLOCK_BYTES = 1 << 16  # of text at a time: 64 KiB make at most 32,768 Python numbers, 1 MB
_NUMERIC = b"0123456789+-.eE, \t\r"
_LONGEST_LINE = 1 << 20


def parse_numbers(text: bytes) -> np.ndarray:
    """Comma-separated JSON numbers as int64, or float64 if one has a point or an exponent.

    Raises:
        DamagedFileError: naming what is no number, does not fit, or is not finite.

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
            raise DamagedFileError("a number of more than 64 KiB")
        block = text[start:end].decode("ascii")
        numbers: list = []
        try:
            numbers = json.loads(f"[{block}]") if block.strip() else [None]
            part = np.array(numbers, values.dtype)
        except OverflowError:
            raise DamagedFileError(f"{_culprit(numbers)}, which does not fit 64 bits") from None
        except (ValueError, TypeError):
            raise DamagedFileError(f"{_culprit(block.split(','))!r}, which is no number") from None
        if real and not np.isfinite(part).all():
            raise DamagedFileError("a number beyond float64's range")
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


def parse_csv(data: bytes) -> tuple[list[str], np.ndarray]:
    """The header, [] where there is none, and the numbers (lines, columns); no empty lines. Raises `DamagedFileError`.

    >>> parse_csv(b"a,b\\n1,2\\n3,4\\n")
    (['a', 'b'], array([[1, 2],
           [3, 4]]))
    """
    header: list[str] = []
    columns = lines = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        if len(line) > _LONGEST_LINE:
            raise DamagedFileError(f"a line of {len(line)} bytes, line {number}")
        text = line.strip()
        if not text:
            continue
        if text.translate(None, _NUMERIC):
            if header or lines:
                raise DamagedFileError(
                    f"{text[:40].decode('utf-8', 'replace')!r} in line {number}, where numbers should be"
                )
            header = [name.strip() for name in text.decode("utf-8", "replace").split(",")]
            columns = len(header)
            data = data[data.index(line) + len(line) :]
            continue
        if columns and text.count(b",") + 1 != columns:
            raise DamagedFileError(
                f"{text.count(b',') + 1} columns in line {number}, where the first line has {columns}"
            )
        columns = text.count(b",") + 1
        lines += 1
    if not lines:
        raise DamagedFileError("no line of numbers")
    flat = data.strip().replace(b"\r", b"").replace(b"\n", b",")
    while b",," in flat:  # empty lines; an empty field is no number, and the count below shows it
        flat = flat.replace(b",,", b",")
    numbers = parse_numbers(flat)
    if numbers.size != lines * columns:
        raise DamagedFileError(f"{numbers.size} numbers in {lines} lines of {columns} columns: a field is empty")
    return header, numbers.reshape(lines, columns)
