"""CSV of numbers, with or without a header line."""

from __future__ import annotations

import io

import numpy as np

from evenmoe.formats.containers.numbers import parse_numbers

_NUMERIC = b"0123456789+-.eE, \t\r"
_LONGEST_LINE = 1 << 20


class CsvError(ValueError):
    """What is wrong in which line."""


def parse_csv(data: bytes) -> tuple[list[str], np.ndarray]:
    """The header, [] where there is none, and the numbers (lines, columns); no empty lines. Raises `CsvError`.

    >>> parse_csv(b"a,b\\n1,2\\n3,4\\n")
    (['a', 'b'], array([[1, 2],
           [3, 4]]))
    """
    header: list[str] = []
    columns = lines = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        if len(line) > _LONGEST_LINE:
            raise CsvError(f"a line of {len(line)} bytes, line {number}")
        text = line.strip()
        if not text:
            continue
        if text.translate(None, _NUMERIC):
            if header or lines:
                raise CsvError(f"{text[:40].decode('utf-8', 'replace')!r} in line {number}, where numbers should be")
            header = [name.strip() for name in text.decode("utf-8", "replace").split(",")]
            columns = len(header)
            data = data[data.index(line) + len(line) :]
            continue
        if columns and text.count(b",") + 1 != columns:
            raise CsvError(f"{text.count(b',') + 1} columns in line {number}, where the first line has {columns}")
        columns = text.count(b",") + 1
        lines += 1
    if not lines:
        raise CsvError("no line of numbers")
    try:
        flat = data.strip().replace(b"\r", b"").replace(b"\n", b",")
        while b",," in flat:  # empty lines; an empty field is no number, and the count below shows it
            flat = flat.replace(b",,", b",")
        numbers = parse_numbers(flat)
    except ValueError as error:
        raise CsvError(str(error)) from None
    if numbers.size != lines * columns:
        raise CsvError(f"{numbers.size} numbers in {lines} lines of {columns} columns: a field is empty")
    return header, numbers.reshape(lines, columns)
