"""Other tools' files: expert placements and recorded loads, read and written.

A name is imported when first used, so that the command line's help needs no numpy.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from evenmoe import import_name, known_names

if TYPE_CHECKING:
    from evenmoe.formats.catalogue import FORMATS as FORMATS
    from evenmoe.formats.catalogue import Entry as Entry
    from evenmoe.formats.catalogue import Format as Format
    from evenmoe.formats.contents import Contents as Contents
    from evenmoe.formats.contents import Finding as Finding
    from evenmoe.formats.contents import RawLoad as RawLoad
    from evenmoe.formats.contents import RawPlacement as RawPlacement
    from evenmoe.formats.contents import ReadOptions as ReadOptions
    from evenmoe.formats.contents import WriteOptions as WriteOptions
    from evenmoe.formats.difference import diff as diff
    from evenmoe.formats.document import Document as Document
    from evenmoe.formats.reading import check as check
    from evenmoe.formats.reading import read as read
    from evenmoe.formats.writing import convert as convert
    from evenmoe.formats.writing import write as write

_HOME = {
    "FORMATS": "evenmoe.formats.catalogue",
    "Contents": "evenmoe.formats.contents",
    "Document": "evenmoe.formats.document",
    "Entry": "evenmoe.formats.catalogue",
    "Finding": "evenmoe.formats.contents",
    "Format": "evenmoe.formats.catalogue",
    "RawLoad": "evenmoe.formats.contents",
    "RawPlacement": "evenmoe.formats.contents",
    "ReadOptions": "evenmoe.formats.contents",
    "WriteOptions": "evenmoe.formats.contents",
    "check": "evenmoe.formats.reading",
    "convert": "evenmoe.formats.writing",
    "diff": "evenmoe.formats.difference",
    "read": "evenmoe.formats.reading",
    "write": "evenmoe.formats.writing",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = partial(import_name, __name__, _HOME), partial(known_names, __name__, _HOME)
