"""A file opened and parsed, not yet understood: `Document`. Which file type it is its content tells, never its name."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from evenmoe.errors import FileFormatError
from evenmoe.formats.contents import Finding
from evenmoe.io import DamagedFileError, Value
from evenmoe.io.text import parse_csv, parse_json, parse_json_lines

_LARGEST_BYTES = {"pt": 1 << 33, "npz": 1 << 32, "npy": 1 << 32, "safetensors": 1 << 32}
_LARGEST_TEXT_BYTES = 1 << 28  # 256 MiB: a hundred times the largest of these text files that we know of
_LARGEST_PIPE_BYTES = 1 << 30  # a pipe does not say how much it holds
_MOST_ENTRIES = 1 << 17  # a record of a long detail dump is one entry
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MOST_TOKENS = 2.0**53
_RANK_IN_NAME = re.compile(r"rank_?([0-9]{1,6})(?![0-9])", re.IGNORECASE)
_PATTERN_HEADER = re.compile(rb"([0-9]{1,9})[ \t]+([0-9]{1,9})[ \t]+([0-9]{1,9})[ \t\r]*")
_WORDS = re.compile(rb"[A-Za-z][A-Za-z0-9_-]*[ \t]+[^,:]*")  # neither CSV nor YAML begins so


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        name: the path, "-" for standard input; errors begin with it.
        container: as in `Format.containers`.
        value: plain data. Lists of numbers are int64 or float64 arrays, and of as many dimensions as the lists nest
            where their lengths agree; other lists are lists, objects are mappings. Text whose first line is words with
            blanks between, without comma and colon, is a string as it stands.
    """

    name: str
    container: str
    value: Value

    def error(self, value: object, rule: str, fix: str) -> FileFormatError:
        return FileFormatError(self.name, value, rule, fix)

    @property
    def fields(self) -> Mapping[Value, Value]:
        """The value as a mapping; empty for anything else, so that `matches` can ask for keys."""
        return self.value if isinstance(self.value, Mapping) else {}

    def says(self, key: str, word: str) -> bool:
        """Whether the field `key` is this word, and not an array that could be compared with it element by element."""
        value = self.fields.get(key)
        return isinstance(value, str) and value == word

    def integer(self, value: object, where: str) -> int:
        """`value`, if it is an integer that fits 63 bits."""
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
            raise self.error(f"with {where} {_short(value)}", "must hold an integer there", "write a whole number")
        return int(value)

    def numbers(self, value: object, where: str, ndim: tuple[int, ...], *, integers: bool = False) -> np.ndarray:
        """`value`, if it is an array of numbers of one of the dimensions `ndim`, none empty; int64 or float64."""
        axes = " or ".join(str(n) for n in ndim)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            raise self.error(
                f"with {where} {_short(value)}",
                f"must hold numbers there, in {axes} dimensions, rows of one length",
                "check how the file was written",
            )
        if value.ndim not in ndim or value.size == 0:
            raise self.error(
                f"with {where} of shape {value.shape}",
                f"must have {axes} dimensions there, none empty",
                "check how the file was written",
            )
        if value.dtype.kind == "f":
            if integers:
                raise self.error(
                    f"with {where} of dtype {value.dtype}", "must hold integers there", "write whole numbers"
                )
            with np.errstate(invalid="ignore"):  # a signalling NaN warns here, and is found later like any other
                return value.astype(np.float64, copy=False)
        if value.dtype == np.uint64 and value.max() >= 2**63:
            raise self.error(f"with {where} up to {value.max()}", "must fit 63 bits there", "check for an overflow")
        if not integers:
            self.check_total(value, where)
        return value.astype(np.int64, copy=False)

    def check_total(self, counts: np.ndarray, where: str) -> None:
        """Raise for counts whose sums may overflow or lose digits."""
        total = counts.sum(dtype=np.float64)
        if total >= _MOST_TOKENS:
            raise self.error(
                f"with {where} of {total:.3g} tokens together",
                "must hold fewer than 2**53, so that sums are exact",
                "check for an overflow where it was recorded",
            )


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
            most = _LARGEST_BYTES.get(_sniff(head) or "", _LARGEST_TEXT_BYTES)
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


def _sniff(head: bytes) -> str | None:
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


def _parse(data: bytes) -> tuple[str, Value]:
    """The file type and the value; a type's module is imported with its first file."""
    if data[:2] == b"PK":
        return _parse_zip(data)
    container = _sniff(data[:16])
    if container == "npy":
        from evenmoe.io.npz import parse_npy

        return container, parse_npy(data)
    if container == "safetensors":
        from evenmoe.io.safetensors_file import parse_safetensors

        return container, parse_safetensors(data)
    if data.startswith(_LEGACY_TORCH):
        raise DamagedFileError("a .pt file of torch before 1.6, a bare pickle; save it again with a newer torch")
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        raise DamagedFileError("a pickle, which runs code when it is read and is therefore never opened")
    return _parse_text(data)


def _parse_zip(data: bytes) -> tuple[str, Value]:
    archive = _open_zip(data)
    names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        from evenmoe.io.torch_file import parse_torch

        return "pt", parse_torch(data, archive)
    if names and all(name.endswith(".npy") for name in names):
        from evenmoe.io.npz import Arrays

        return "npz", Arrays(archive, len(data))
    raise DamagedFileError(f"a zip of {len(names)} entries that is neither .npz nor .pt")


def _open_zip(data: bytes) -> zipfile.ZipFile:
    """The archive, its directory checked before anything is unpacked: plain, distinct entries that do not overlap."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # damaged directories raise BadZipFile, struct.error, NotImplementedError, …
        raise DamagedFileError(f"a damaged zip ({str(error)[:80] or type(error).__name__})") from None
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise DamagedFileError(f"a zip of {len(entries)} entries, more than {_MOST_ENTRIES}")
    if archive.comment:
        raise DamagedFileError("a zip with a comment, in which a second directory may hide")
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise DamagedFileError("a zip that names one entry twice")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = repr(entry.filename[:60])
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedFileError(f"a zip whose entry {name} is encrypted or oddly compressed")
        # A local header has at least 30 bytes. Entries that share bytes are how a small file becomes a huge one.
        if entry.header_offset < end or entry.header_offset + 30 + entry.compress_size > len(data):
            raise DamagedFileError(f"a zip whose entry {name} overlaps another or the end")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise DamagedFileError(f"a zip whose entry {name} has two sizes")
        end = entry.header_offset + 30 + entry.compress_size
    return archive


def _parse_text(data: bytes) -> tuple[str, Value]:
    data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows puts before UTF-8
    start = data[:4096].lstrip()
    if not start:
        raise DamagedFileError("an empty file")
    if b"\0" in start:
        raise DamagedFileError("binary data of no known kind")
    if start[:1] in (b"{", b"["):
        return _parse_json(data)
    line = start.split(b"\n", 1)[0]
    sizes = _PATTERN_HEADER.fullmatch(line)
    if sizes is not None:
        return "text", _parse_pattern(data, data.index(line) + len(line), tuple(map(int, sizes.groups())))
    if _WORDS.fullmatch(line):
        return "text", _plain_text(data)
    numeric = not line.strip().translate(None, b"0123456789.+-eE, ")
    if numeric or (b":" not in line and line[:1] not in (b"#", b"%", b"-")):  # what YAML may begin with
        return "csv", parse_csv(data)
    from evenmoe.io.yaml_text import parse_yaml

    return "yaml", parse_yaml(data)


def _plain_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"text that is not UTF-8, from byte {error.start} on") from None


def _parse_pattern(data: bytes, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """int8 of this shape, from digits 0 and 1 with spaces between."""
    text = np.frombuffer(data, np.uint8, offset=start)
    digits = text[text > ord(" ")]
    if len(digits) != shape[0] * shape[1] * shape[2]:
        raise DamagedFileError(f"a pattern of {len(digits)} digits with the header {' '.join(map(str, shape))}")
    is_digit = text > ord(" ")
    if (digits < ord("0")).any() or (digits > ord("1")).any() or (is_digit[1:] & is_digit[:-1]).any():
        raise DamagedFileError("a pattern with something else than 0 and 1, separated by spaces")
    return (digits - ord("0")).astype(np.int8).reshape(shape)


def _parse_json(data: bytes) -> tuple[str, Value]:
    try:
        return "json", parse_json(data)
    except DamagedFileError as error:
        if "more text after the value" not in str(error):
            raise
    return "jsonl", parse_json_lines(data)


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files of this suffix, by name; hidden ones are no recorder's."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()
    )


def documents_of(document: Document, suffix: str, notes: list[str]) -> Iterator[Document]:
    """The document itself; of a folder every file of this suffix, one after the other."""
    if document.container != "folder":
        yield document
        return
    files = files_in(document.value, suffix)
    if not files:
        raise document.error(f"a folder without {suffix} files", "must hold one a rank", "name the recorder's folder")
    notes += left_out(document.value, files)
    for path in files:
        yield parse_document(str(path), read_bytes(path))


def left_out(folder: Path, files: list[Path]) -> list[str]:
    """The note on the folder's other files, if there are any."""
    others = sum(path.is_file() for path in folder.iterdir()) - len(files)
    return [f"left out {others} other files of the folder"] if others else []


def rank_in_name(name: str) -> int | None:
    """The rank that a file's name tells, as in expert_load_rank3.json."""
    match = _RANK_IN_NAME.search(Path(name).name)
    return int(match.group(1)) if match else None


def one_rank_alone(rank: int | None) -> str:
    """The note on counts of a single rank."""
    return (
        f"{'one rank' if rank is None else f'rank {rank}'} alone: the recorder counts each rank's own tokens; "
        "name the folder of all ranks' files to have them summed"
    )


def ranks_summed(ranks: list[int], what: str) -> str:
    """The note on ranks that were added up."""
    return f"summed the {what} of {len(ranks)} ranks" if ranks else f"summed the {what} of all files"


def first_line(path: Path, most: int) -> bytes:
    """At most so many bytes of the file's first line. Raises FileFormatError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.readline(most)
    except OSError as error:
        raise FileFormatError(
            str(path), f"not readable ({error.strerror})", "must be a readable file", "check its permissions"
        ) from error


def missing_ranks(ranks: list[int]) -> list[Finding]:
    """An error where ranks are not 0 to the last one."""
    if ranks == list(range(len(ranks))):
        return []
    text = f"ranks {ranks[0]} to {ranks[-1]}, {len(ranks)} of them"
    return [Finding("error", "missing-rank", text, "should have a file of every rank", "add it")]


def _short(value: object) -> str:
    """What a wrong value is, in a few words, however large it is."""
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}, shape {value.shape}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items that are no equal rows of numbers"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
