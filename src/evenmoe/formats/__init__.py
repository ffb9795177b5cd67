"""Other tools' files: expert placements and recorded loads, read and written.

A name is imported when first used, so that the command line's help needs no numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evenmoe.lazy import lazy_names

if TYPE_CHECKING:
    from evenmoe.formats.catalogue import FORMATS as FORMATS
    from evenmoe.formats.catalogue import Format as Format
    from evenmoe.formats.checking import check as check
    from evenmoe.formats.contents import Contents as Contents
    from evenmoe.formats.converting import convert as convert
    from evenmoe.formats.difference import diff as diff
    from evenmoe.formats.findings import Finding as Finding
    from evenmoe.formats.reading import read as read
    from evenmoe.formats.writing import write as write

_HOME = {
    "FORMATS": "evenmoe.formats.catalogue",
    "Contents": "evenmoe.formats.contents",
    "Finding": "evenmoe.formats.findings",
    "Format": "evenmoe.formats.catalogue",
    "check": "evenmoe.formats.checking",
    "convert": "evenmoe.formats.converting",
    "diff": "evenmoe.formats.difference",
    "read": "evenmoe.formats.reading",
    "write": "evenmoe.formats.writing",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOME)
