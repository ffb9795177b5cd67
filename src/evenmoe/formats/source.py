"""Where bytes come from, and which file type they are: judged by content, the name is never looked at."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from evenmoe.errors import FileFormatError
from evenmoe.formats.document import Document
from evenmoe.io import DamagedFileError
from evenmoe.io.csv_text import parse_csv
from evenmoe.io.json_text import parse_json, parse_json_lines

_LARGEST_BYTES = {"pt": 1 << 33, "npz": 1 << 32, "npy": 1 << 32, "safetensors": 1 << 32}
_LARGEST_TEXT_BYTES = 1 << 28  # 256 MiB: a hundred times the largest of these text files that we know of
_LARGEST_PIPE_BYTES = 1 << 30  # a pipe does not say how much it holds
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def open_document(source: str | Path) -> Document:
    """Read and parse a file, a folder (kept closed), "-" for standard input, JSON given inline, or the word `trivial`.

    Raises:
        FileFormatError: not readable, of no known file type, or damaged; it names the place.
    """
    text = str(source)
    if text == "trivial":
        return Document(text, "text", text)
    if text.lstrip().startswith("{"):
        return parse_document("the inline JSON", text.encode())
    if text == "-":
        return parse_document("-", _read_standard_input())
    path = Path(source)
    if path.is_dir():
        return Document(text, "folder", path)
    return parse_document(text, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The whole file; of a pipe at most 1 GiB. Raises FileFormatError where it cannot be read."""
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                return _read_pipe(str(path), file)
            size = path.stat().st_size
            head = file.read(16)
            most = _LARGEST_BYTES.get(sniff(head) or "", _LARGEST_TEXT_BYTES)
            if head[:2] == b"PK":
                most = _LARGEST_BYTES["pt"]
            if size > most:
                raise FileFormatError(
                    str(path), f"a file of {size} bytes", f"must have at most {most}", "keep fewer windows"
                )
            file.seek(0)
            return file.read()
    except OSError as error:
        raise FileFormatError(
            str(path), f"not readable ({error.strerror})", "must be an existing file", "check the path"
        ) from error


def _read_standard_input() -> bytes:
    reason = os.strerror(errno.EBADF)  # of one that was closed before Python started
    try:
        if sys.stdin is not None:
            return _read_pipe("-", sys.stdin.buffer)
    except OSError as error:
        reason = error.strerror
    raise FileFormatError(
        "-", f"standard input, which is not readable ({reason})", "must be open", "pipe the file in, or name it"
    )


def _read_pipe(name: str, file: BinaryIO) -> bytes:
    data = file.read(_LARGEST_PIPE_BYTES + 1)
    if len(data) > _LARGEST_PIPE_BYTES:
        raise FileFormatError(
            name, f"a pipe of more than {_LARGEST_PIPE_BYTES} bytes", "must end before", "write it to a file first"
        )
    return data


def sniff(head: bytes) -> str | None:
    """The file type that the first 16 bytes tell; None for text and zips, which need a look inside."""
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if len(head) > 8 and head[8:9] == b"{" and head[7:8] == b"\0":
        return "safetensors"
    return None


def parse_document(name: str, data: bytes) -> Document:
    """Parse bytes of any known file type. Raises FileFormatError."""
    try:
        container, value = _parse(data)
    except ValueError as error:
        raise FileFormatError(
            name, str(error), "must be an intact file of a format that evenmoe reads", "write or download it again"
        ) from None
    return Document(name, container, value)


def _parse(data: bytes) -> tuple[str, Any]:
    if data[:2] == b"PK":
        return _parse_zip(data)
    container = sniff(data[:16])
    if container == "npy":
        from evenmoe.io.npz import parse_npy

        return container, parse_npy(data)
    if container == "safetensors":
        from evenmoe.io.safetensors_file import parse_safetensors

        return container, parse_safetensors(data)
    if data.startswith(_LEGACY_TORCH):
        raise ValueError("a .pt file of torch before 1.6, a bare pickle; save it again with a newer torch")
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        raise ValueError("a pickle, which runs code when it is read and is therefore never opened")
    return _parse_text(data)


def _parse_zip(data: bytes) -> tuple[str, Any]:
    from evenmoe.io.npz import open_zip

    names = open_zip(data).namelist()
    if any(name.endswith("data.pkl") for name in names):
        from evenmoe.io.torch_file import parse_torch

        return "pt", parse_torch(data)
    from evenmoe.io.npz import Arrays

    if names and all(name.endswith(".npy") for name in names):
        return "npz", Arrays(data)
    raise ValueError(f"a zip of {len(names)} entries that is neither .npz nor .pt")


def _parse_text(data: bytes) -> tuple[str, Any]:
    data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows puts before UTF-8
    start = data[:4096].lstrip()
    if not start:
        raise ValueError("an empty file")
    if b"\0" in start:
        raise ValueError("binary data of no known kind")
    if start[:1] in (b"{", b"["):
        return _parse_json(data)
    line = start.split(b"\n", 1)[0]
    numeric = not line.strip().translate(None, b"0123456789.+-eE, ")
    if numeric or (b":" not in line and line[:1] not in (b"#", b"%", b"-")):  # what YAML may begin with
        return "csv", parse_csv(data)
    from evenmoe.io.yaml_text import parse_yaml

    return "yaml", parse_yaml(data)


def _parse_json(data: bytes) -> tuple[str, Any]:
    try:
        return "json", parse_json(data)
    except DamagedFileError as error:
        if "more text after the value" not in str(error):
            raise
    return "jsonl", parse_json_lines(data)
