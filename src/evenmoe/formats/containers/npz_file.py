"""numpy's .npy and .npz: headers read and judged first, arrays when asked for; nothing is unpickled."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np

from evenmoe.formats.containers.zip_archive import open_zip
from evenmoe.formats.document import ALLOWANCE_BYTES


class NpyError(ValueError):
    """What is wrong with which array."""


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz, each read when asked for; `NpyError` then, or where the archive is damaged."""

    def __init__(self, data: bytes) -> None:
        try:
            self._archive = open_zip(data)
        except ValueError as error:
            raise NpyError(str(error)) from None
        self._entries = {e.filename.removesuffix(".npy"): e for e in self._archive.infolist()}
        self._left = 9 * len(data) + ALLOWANCE_BYTES
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        try:
            with self._archive.open(entry) as stream:
                array = _read(stream, entry.file_size, name, self._left)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise NpyError(f"`{name}` that cannot be unpacked ({str(error)[:80]})") from None
        except NpyError:
            raise
        except Exception as error:  # zlib.error, struct.error, UnicodeDecodeError: a damaged entry
            raise NpyError(f"`{name}` that cannot be unpacked ({str(error)[:80] or type(error).__name__})") from None
        self._left -= array.nbytes if name not in self._seen else 0
        self._seen.add(name)
        return array


def parse_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file. Raises `NpyError`."""
    return _read(io.BytesIO(data), len(data), "the array", 9 * len(data) + ALLOWANCE_BYTES)


def _read(stream: IO[bytes], size: int, name: str, most: int) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # numpy parses the header with ast: ValueError, SyntaxError, MemoryError, TypeError, …
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise NpyError(f"`{name}` with a damaged header ({reason})") from None
    if dtype.kind not in "biufUS":
        raise NpyError(f"`{name}` of dtype {dtype}, neither numbers nor text")
    count = 1
    for length in shape:
        count *= length  # Python's integers: a header may claim any size
    if count < 0 or count * dtype.itemsize != size - stream.tell():
        raise NpyError(f"`{name}` of shape {shape} in {size} bytes, which is another size")
    if count * dtype.itemsize > most:
        raise NpyError(f"`{name}` of {count * dtype.itemsize} bytes, more than 10 times the file")
    values = np.empty(count, dtype)
    view, filled = values.view(np.uint8).data if count and dtype.itemsize else memoryview(b""), 0
    while filled < len(view):
        part = stream.read(min(1 << 20, len(view) - filled))
        if not part:
            raise NpyError(f"`{name}` that ends early")
        view[filled : filled + len(part)] = part
        filled += len(part)
    return values.reshape(shape, order="F" if fortran else "C")
