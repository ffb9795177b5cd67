"""Arrays in and out of .npz archives: nothing unpickled, nothing allocated on a header's word, same bytes each time."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from typing import IO

import numpy as np
import numpy.typing as npt

from evenmoe.errors import FileFormatError

#: (what was found, rule, fix) -> the error to raise.
Refuse = Callable[[str, str, str], FileFormatError]
Scalar = str | int | float

_LARGEST_BYTES = 1 << 32  # of an array as int64, 4 GiB: a hundred times the largest trace that we know of
_LARGEST_TEXT = 1 << 16  # characters of `metadata`
_PIECE = 1 << 20  # bytes decompressed at a time


def read_integers(archive: zipfile.ZipFile, name: str, refuse: Refuse) -> npt.NDArray[np.integer] | None:
    """The array of this name, of any integer type and byte order, or None if the archive has none."""
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream)
        if dtype.kind not in "iu":
            raise refuse(f"`{name}` of dtype {dtype}", "must hold integers", "convert it with .astype(np.int64)")
        # Before anything is allocated: a header may claim any size.
        count = int(np.prod(shape, dtype=object))
        if count * dtype.itemsize != info.file_size - stream.tell() or 8 * count > _LARGEST_BYTES:
            raise refuse(
                f"`{name}` of shape {shape} in {info.file_size} bytes",
                f"must hold as many bytes as its shape says, and at most {_LARGEST_BYTES // 8} numbers",
                "write it again",
            )
        numbers = np.empty(count, dtype)
        _fill(stream, numbers.view(np.uint8))
    return numbers.reshape(shape, order="F" if fortran else "C")


def read_metadata(archive: zipfile.ZipFile, refuse: Refuse) -> dict[str, Scalar]:
    """The flat JSON object in the text `metadata`; empty if the archive has none."""
    if "metadata.npy" not in archive.namelist():
        return {}
    info = archive.getinfo("metadata.npy")
    with archive.open(info) as stream:
        shape, _, dtype = _read_header(stream)
        if dtype.kind != "U" or shape != () or dtype.itemsize != info.file_size - stream.tell():
            raise refuse(
                f"`metadata` of dtype {dtype} and shape {shape}",
                "must be one text",
                "store json.dumps of a flat object",
            )
        _check_length(dtype.itemsize // 4, refuse)
        text = str(np.frombuffer(stream.read(), dtype)[0]) if dtype.itemsize else ""
    return parse_metadata(text, refuse)


def parse_metadata(text: str, refuse: Refuse) -> dict[str, Scalar]:
    """The flat JSON object that `text` is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"`metadata` that is not JSON ({error})", "must be a JSON object", "write it again") from error
    return check_metadata(values, refuse)


def metadata_text(values: Mapping[str, Scalar], refuse: Refuse) -> str:
    """What `parse_metadata` reads, no longer than `read_metadata` takes."""
    text = json.dumps(values)
    _check_length(len(text), refuse)
    return text


def _check_length(characters: int, refuse: Refuse) -> None:
    if characters > _LARGEST_TEXT:
        raise refuse(
            f"`metadata` of {characters} characters", f"must be at most {_LARGEST_TEXT} characters", "store less"
        )


def check_metadata(values: object, refuse: Refuse) -> dict[str, Scalar]:
    """`values` as a dict of texts and finite numbers under text keys, in sorted order."""
    if not isinstance(values, Mapping):
        raise refuse(f"`metadata` of type {type(values).__name__}", "must be an object", "give names to its values")
    for key, value in values.items():
        good = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not isinstance(key, str) or not good or (isinstance(value, float) and not math.isfinite(value)):
            raise refuse(
                f"`metadata` with {key!r}: {str(value)[:60]}",
                "must hold texts and finite numbers under text keys",
                "leave other values out, or write them as text",
            )
    return dict(sorted(values.items()))


def archive_bytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """The .npz of these arrays; the same arrays give the same bytes, whenever and wherever they are written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3  # else it says on which system it was written
            with archive.open(member, "w", force_zip64=array.nbytes > 1 << 30) as stream:
                np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _fill(stream: IO[bytes], memory: npt.NDArray[np.uint8]) -> None:
    """In pieces: a decompressed member never exists twice."""
    filled = 0
    while filled < len(memory):
        piece = stream.read(min(_PIECE, len(memory) - filled))
        if not piece:
            raise EOFError("the archive ends within an array")
        memory[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
