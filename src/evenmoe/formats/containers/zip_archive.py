"""The outside of a zip, which .npz and .pt are: each lie that a zip can tell is refused before anything is unpacked."""

from __future__ import annotations

import io
import zipfile

_MOST_ENTRIES = 1 << 17  # a record of a long detail dump is one entry


def open_zip(data: bytes) -> zipfile.ZipFile:
    """The archive, its directory checked: plain, unencrypted, distinct entries that do not overlap.

    Raises:
        ValueError: naming the entry and what is wrong with it.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # damaged directories raise BadZipFile, struct.error, NotImplementedError, …
        raise ValueError(f"a damaged zip ({str(error)[:80] or type(error).__name__})") from None
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise ValueError(f"a zip of {len(entries)} entries, more than {_MOST_ENTRIES}")
    if archive.comment:
        raise ValueError("a zip with a comment, in which a second directory may hide")
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise ValueError("a zip that names one entry twice")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"a zip whose entry {entry.filename[:60]!r} is encrypted or oddly compressed")
        # A local header has at least 30 bytes. Entries that share bytes are how a small file becomes a huge one.
        if entry.header_offset < end or entry.header_offset + 30 + entry.compress_size > len(data):
            raise ValueError(f"a zip whose entry {entry.filename[:60]!r} overlaps another or the end")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise ValueError(f"a zip whose entry {entry.filename[:60]!r} has two sizes")
        end = entry.header_offset + 30 + entry.compress_size
    return archive
