"""Folders of a recorder that writes one file a rank, and what is said of ranks that are there or are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evenmoe.errors import FileFormatError
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.source import parse_document, read_bytes


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
        raise document.refuse(f"a folder without {suffix} files", "must hold one a rank", "name the recorder's folder")
    notes += left_out(document.value, files)
    for path in files:
        yield parse_document(str(path), read_bytes(path))


def left_out(folder: Path, files: list[Path]) -> list[str]:
    """The note on the folder's other files, if there are any."""
    others = sum(path.is_file() for path in folder.iterdir()) - len(files)
    return [f"left out {others} other files of the folder"] if others else []


def first_line(path: Path, most: int) -> bytes:
    """At most so many bytes of the file's first line. Raises FileFormatError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.readline(most)
    except OSError as error:
        raise FileFormatError(
            str(path), f"not readable ({error.strerror})", "must be a readable file", "check its permissions"
        ) from error


def alone(rank: int | None) -> str:
    """The note on counts of a single rank."""
    return (
        f"{'one rank' if rank is None else f'rank {rank}'} alone: the recorder counts each rank's own tokens; "
        "name the folder of all ranks' files to have them summed"
    )


def summed(ranks: list[int], what: str) -> str:
    """The note on ranks that were added up."""
    return f"summed the {what} of {len(ranks)} ranks" if ranks else f"summed the {what} of all files"


def missing_ranks(ranks: list[int]) -> list[Finding]:
    """An error where ranks are not 0 to the last one."""
    if ranks == list(range(len(ranks))):
        return []
    text = f"ranks {ranks[0]} to {ranks[-1]}, {len(ranks)} of them"
    return [Finding("error", "missing-rank", text, "should have a file of every rank", "add it")]
