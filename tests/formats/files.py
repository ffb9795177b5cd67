"""Files as a test writes them, and what reading them gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError


def written(folder: Path, content: bytes | str, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def loaded(source, **told) -> list:
    """The numbers of a load."""
    contents = formats.read(source, **told)
    assert contents.load is not None
    return contents.load.tolist()


def read_error(source, **told) -> str:
    """What `read` raises, in words."""
    with pytest.raises((FileFormatError, ConstraintError)) as caught:
        formats.read(source, **told)
    return str(caught.value)
