"""What a replay found as one HTML page and figures. A name is imported when first used."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from evenmoe import import_name, known_names

if TYPE_CHECKING:
    from evenmoe.report.look import Look as Look
    from evenmoe.report.page import write_report as write_report

_HOME = {"Look": "evenmoe.report.look", "write_report": "evenmoe.report.page"}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = partial(import_name, __name__, _HOME), partial(known_names, __name__, _HOME)
