"""JSON and CSV within a memory budget: numbers become arrays as they are read, without an object for each of them.

Python's own parser makes an object of 28 bytes for every number, of 64 for every `{}`: 24 × a hostile file's size.
"""

from __future__ import annotations

import io
import json
import re

import numpy as np

from evenmoe.io import ALLOWANCE_BYTES, DamagedFileError, Value

_BLOCK_BYTES = 1 << 16  # of text at a time: 64 KiB make at most 32,768 Python numbers, 1 MB
_NUMERIC = b"0123456789+-.eE, \t\r"
_LONGEST_LINE = 1 << 20
_SPACE = re.compile(rb"[ \t\r\n]*")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_STARTS = tuple(bytes([mark]) for mark in b"-0123456789")
_OF_NUMBERS = b"0123456789+-.eE, \t\r\n"
_WORDS = {b"true": True, b"false": False, b"null": None}
_DEEPEST = 16  # levels; the deepest format has five
_LONGEST_KEY = 1 << 16
_MOST_QUOTES = 1 << 22  # escaped ones in a string: a second
_MOST_PARTS = 1 << 19  # lists, objects, words: five seconds; the largest map that we know of has 60,000
_EMPTY = np.empty(0, np.int64)
_EMPTY.flags.writeable = False
_ROWS = 256  # stacked at a time, so that no list of small arrays grows long
_ROW_BYTES = 150  # a small array's header and its pointer


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


def parse_json(data: bytes) -> Value:
    """One JSON value: lists of numbers as arrays, see `Document.value`. Raises `DamagedFileError`.

    >>> parse_json(b'{"a": [[1, 2], [3, 4]], "b": [1.5], "c": "x"}')
    {'a': array([[1, 2],
           [3, 4]]), 'b': array([1.5]), 'c': 'x'}
    """
    values = _Parser(data).values(most=1)
    return values[0]


def parse_json_lines(data: bytes) -> list[Value]:
    """JSON values, one after another."""
    return _Parser(data).values(most=None)


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.left = 8 * len(data) + ALLOWANCE_BYTES  # bytes of objects
        self.keys: dict[bytes, str] = {}
        self.parts = 0

    def values(self, most: int | None) -> list[Value]:
        found = []
        self.space()
        while not found or self.at < len(self.data):
            if most is not None and len(found) == most:
                raise self.wrong("more text after the value")
            self.spend(100)
            found.append(self.value(0))
            self.space()
        return found

    def value(self, depth: int) -> Value:
        if depth > _DEEPEST:
            raise self.wrong(f"nested more than {_DEEPEST} levels deep")
        self.parts += 1
        if self.parts > _MOST_PARTS:
            raise self.wrong(f"more than {_MOST_PARTS} lists, objects and words")
        first = self.data[self.at : self.at + 1]
        if first == b"{":
            return self.object(depth)
        if first == b"[":
            return self.array(depth)
        if first == b'"':
            return self.string()
        for word, value in _WORDS.items():
            if self.data.startswith(word, self.at):
                self.at += len(word)
                return value
        number = _NUMBER.match(self.data, self.at)
        if number is None:
            ending = self.data[self.at : self.at + 8].decode("ascii", "replace")
            raise self.wrong(f"no JSON value at {ending!r}" if ending else "the text ends early")
        text = number.group()
        try:
            value = parse_numbers(text)[0].item()
        except ValueError as error:
            raise self.wrong(str(error)) from None
        self.at = number.end()
        self.spend(40)
        return value

    def object(self, depth: int) -> dict[str, Value]:
        self.spend(100)
        self.at += 1
        found: dict[str, Value] = {}
        self.space()
        if self.take(b"}"):
            return found
        while True:
            if self.data[self.at : self.at + 1] != b'"':
                raise self.wrong("an object's key must be a string")
            key = self.string(key=True)
            if key in found:
                raise self.wrong(f"the key {key[:40]!r} twice in one object")
            self.space()
            if not self.take(b":"):
                raise self.wrong("`:` is missing after a key")
            self.space()
            self.spend(100)
            found[key] = self.value(depth + 1)
            self.space()
            if self.take(b"}"):
                return found
            if not self.take(b","):
                raise self.wrong("`,` or `}` is missing")
            self.space()

    def array(self, depth: int) -> Value:
        self.spend(_ROW_BYTES)
        self.at += 1
        self.space()
        if self.take(b"]"):
            return _EMPTY
        numbers = self.row_of_numbers()
        if numbers is not None:
            return numbers
        rows = Rows()
        while True:
            rows.append(self.value(depth + 1))
            self.left += rows.released
            self.spend(16)
            self.space()
            if self.take(b"]"):
                self.spend(rows.apart() * _ROW_BYTES)
                return rows.value()
            if not self.take(b","):
                raise self.wrong("`,` or `]` is missing")
            self.space()

    def row_of_numbers(self) -> np.ndarray | None:
        """The rest of an array that holds only numbers; None, and nothing read, for any other."""
        if self.data[self.at : self.at + 1] not in _NUMBER_STARTS:
            return None
        end = self.data.find(b"]", self.at)
        text = self.data[self.at : end] if end >= 0 else b"?"
        if text.translate(None, _OF_NUMBERS):
            return None
        self.spend(8 * (text.count(b",") + 1))
        try:
            numbers = parse_numbers(text)
        except ValueError as error:
            raise self.wrong(str(error)) from None
        self.at = end + 1
        return numbers

    def string(self, key: bool = False) -> str:
        end = self.at
        for _ in range(_MOST_QUOTES):
            end = self.data.find(b'"', end + 1, self.at + _LONGEST_KEY if key else len(self.data))
            if end < 0:
                raise self.wrong("a string without an end" + (f", or of more than {_LONGEST_KEY} bytes" if key else ""))
            before = end
            while self.data[before - 1 : before] == b"\\":
                before -= 1
            if (end - before) % 2 == 0:
                break
        else:
            raise self.wrong(f"a string with more than {_MOST_QUOTES} quotes")
        text = self.data[self.at : end + 1]
        if key and text in self.keys:
            self.at = end + 1
            return self.keys[text]
        try:
            value = json.loads(text)
        except ValueError:
            raise self.wrong("a string with a control character, a bad escape or bad UTF-8") from None
        self.spend(2 * (100 + 5 * len(text)) if key else 60 + 4 * len(text))
        self.at = end + 1
        if key:
            self.keys[text] = value
        return value

    def space(self) -> None:
        match = _SPACE.match(self.data, self.at)
        assert match is not None  # it matches nothing, too
        self.at = match.end()

    def take(self, mark: bytes) -> bool:
        if self.data[self.at : self.at + 1] != mark:
            return False
        self.at += 1
        return True

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.wrong("more small values than a file of its size may hold in memory")

    def wrong(self, what: str) -> DamagedFileError:
        line = self.data.count(b"\n", 0, self.at) + 1
        column = self.at - self.data.rfind(b"\n", 0, self.at)
        return DamagedFileError(f"{what}, line {line} column {column}")


class Rows:
    """A list's items, stacked into one array while all are arrays of one shape.

    `released`: bytes of small arrays that the last append made superfluous.
    """

    def __init__(self) -> None:
        self.items: list[Value] = []
        self.blocks: list[np.ndarray] = []
        self.released = 0

    def append(self, item: Value) -> None:
        self.items.append(item)
        self.released = 0
        if len(self.items) == _ROWS:
            stacked = _stack(self.items)
            if stacked is not None:
                self.blocks.append(stacked)
                self.items = []
                self.released = (_ROWS - 1) * _ROW_BYTES

    def apart(self) -> int:
        """How many rows were stacked that must be taken apart again, because another one does not fit them."""
        return 0 if self._whole() is not None else sum(len(block) for block in self.blocks)

    def value(self) -> Value:
        """The items: one array if all are arrays of one shape, otherwise a list."""
        whole = self._whole()
        if whole is not None:
            return np.concatenate(whole) if len(whole) > 1 else whole[0]
        return [row for block in self.blocks for row in block] + self.items

    def _whole(self) -> list[np.ndarray] | None:
        last = _stack(self.items) if self.items else None
        if self.items and last is None:
            return None
        parts = self.blocks if last is None else [*self.blocks, last]
        return parts if all(part.shape[1:] == parts[0].shape[1:] for part in parts) else None


def _stack(items: list[Value]) -> np.ndarray | None:
    if not all(isinstance(item, np.ndarray) and item.shape == items[0].shape for item in items):
        return None
    return np.stack(items)


def json_bytes(value: Value) -> bytes:
    """`value` as JSON, a row of numbers never broken, everything around it indented; whole floats keep their point.

    >>> print(json_bytes({"a": np.array([[1, 2], [3, 4]])}).decode(), end="")
    {
     "a": [
      [1, 2],
      [3, 4]
     ]
    }
    """
    return (_text(value, 0) + "\n").encode()


def _text(value: Value, depth: int) -> str:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(str(key))}: {_text(item, depth + 1)}" for key, item in value.items())
        return "{" + inner + ("," + inner).join(items) + outer + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple, np.ndarray)) for item in value):
        return "[" + inner + ("," + inner).join(_text(item, depth + 1) for item in value) + outer + "]"
    return json.dumps(value)
