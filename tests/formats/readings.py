"""What the measured processes do: read one file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from evenmoe import formats
from evenmoe.errors import FileFormatError


def read(path: Path) -> None:
    """Read a file for one rank, or find that it cannot be read."""
    with contextlib.suppress(FileFormatError):
        formats.read(path, num_ranks=1)


def take(count: int) -> None:
    """Fill `count` numbers of 8 bytes."""
    np.ones(count)
