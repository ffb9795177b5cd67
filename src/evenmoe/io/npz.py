"""numpy's .npy and .npz: headers are judged before anything is allocated, and nothing is unpickled."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import numpy as np
import numpy.typing as npt

from evenmoe.errors import FileFormatError
from evenmoe.io import ALLOWANCE_BYTES, DamagedFileError

#: (what was found, rule, fix) -> the error to raise.
MakeError = Callable[[str, str, str], FileFormatError]

_LARGEST_BYTES = 1 << 32  # of an array of integers as int64, 4 GiB: a hundred times the largest trace that we know of
_LARGEST_TEXT = 1 << 16  # characters
_PIECE = 1 << 20  # bytes decompressed at a time


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz of `size` bytes, its directory checked; each is read when asked for.

    Raises:
        DamagedFileError: then.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._entries = {e.filename.removesuffix(".npy"): e for e in archive.infolist()}
        self._left = 9 * size + ALLOWANCE_BYTES
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
        except DamagedFileError:
            raise
        except Exception as error:  # BadZipFile, OSError, EOFError, zlib.error, struct.error, UnicodeDecodeError, …
            reason = str(error)[:80] or type(error).__name__
            raise DamagedFileError(f"`{name}` that cannot be unpacked ({reason})") from None
        self._left -= array.nbytes if name not in self._seen else 0
        self._seen.add(name)
        return array


def parse_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file. Raises `DamagedFileError`."""
    return _read(io.BytesIO(data), len(data), "the array", 9 * len(data) + ALLOWANCE_BYTES)


def read_integers(archive: zipfile.ZipFile, name: str, make_error: MakeError) -> npt.NDArray[np.integer] | None:
    """The array of this name, of any integer type and byte order, or None if the archive has none."""
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream)
        if dtype.kind not in "iu":
            raise make_error(f"`{name}` of dtype {dtype}", "must hold integers", "convert it with .astype(np.int64)")
        count = _count(shape)
        if count * dtype.itemsize != info.file_size - stream.tell() or 8 * count > _LARGEST_BYTES:
            raise make_error(
                f"`{name}` of shape {shape} in {info.file_size} bytes",
                f"must hold as many bytes as its shape says, and at most {_LARGEST_BYTES // 8} numbers",
                "write it again",
            )
        numbers = np.empty(count, dtype)
        if not _fill(stream, numbers):
            raise EOFError("the archive ends within an array")
    return numbers.reshape(shape, order="F" if fortran else "C")


def read_text(archive: zipfile.ZipFile, name: str, make_error: MakeError) -> str | None:
    """The text of this name, or None if the archive has none."""
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, _, dtype = _read_header(stream)
        if dtype.kind != "U" or shape != () or dtype.itemsize != info.file_size - stream.tell():
            raise not_one_text(name, shape, dtype, make_error)
        check_text_length(dtype.itemsize // 4, name, make_error)
        return str(np.frombuffer(stream.read(), dtype)[0]) if dtype.itemsize else ""


def not_one_text(name: str, shape: tuple[int, ...], dtype: np.dtype, make_error: MakeError) -> FileFormatError:
    """The error for an array that should be a text."""
    fix = "store json.dumps of a flat object"
    return make_error(f"`{name}` of dtype {dtype} and shape {shape}", "must be one text", fix)


def check_text_length(characters: int, name: str, make_error: MakeError) -> None:
    """Raise an error for a text that `read_text` would not read."""
    if characters > _LARGEST_TEXT:
        rule = f"must be at most {_LARGEST_TEXT} characters"
        raise make_error(f"`{name}` of {characters} characters", rule, "store less")


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy of this array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, np.ndarray], *, compress: bool) -> bytes:
    """The .npz of these arrays; the same arrays give the same bytes, whenever and wherever they are written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            member.create_system = 3  # else it says on which system it was written
            with archive.open(member, "w", force_zip64=not compress or array.nbytes > 1 << 30) as stream:
                np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def _read(stream: IO[bytes], size: int, name: str, most: int) -> np.ndarray:
    try:
        shape, fortran, dtype = _read_header(stream)
    except Exception as error:  # numpy parses the header with ast: ValueError, SyntaxError, MemoryError, TypeError, …
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DamagedFileError(f"`{name}` with a damaged header ({reason})") from None
    if dtype.kind not in "biufUS":
        raise DamagedFileError(f"`{name}` of dtype {dtype}, neither numbers nor text")
    count = _count(shape)
    if count < 0 or count * dtype.itemsize != size - stream.tell():
        raise DamagedFileError(f"`{name}` of shape {shape} in {size} bytes, which is another size")
    if count * dtype.itemsize > most:
        raise DamagedFileError(f"`{name}` of {count * dtype.itemsize} bytes, more than 10 times the file")
    values = np.empty(count, dtype)
    if not _fill(stream, values):
        raise DamagedFileError(f"`{name}` that ends early")
    return values.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _count(shape: tuple[int, ...]) -> int:
    """The numbers of an array; Python's integers, since a header may claim any size."""
    count = 1
    for length in shape:
        count *= length
    return count


def _fill(stream: IO[bytes], values: np.ndarray) -> bool:
    """Whether the stream has bytes for all values; in pieces, so that a decompressed member never exists twice."""
    view, filled = values.view(np.uint8).data if values.nbytes else memoryview(b""), 0
    while filled < len(view):
        piece = stream.read(min(_PIECE, len(view) - filled))
        if not piece:
            return False
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    return True
