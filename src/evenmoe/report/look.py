"""How figures look that are written to files: their format, size and style."""

from __future__ import annotations

from dataclasses import dataclass

from evenmoe.errors import ConstraintError, require

FORMATS = ("png", "svg", "pdf")
WIDTH = 9.0  # inches
_LEAST, _MOST = 2.0, 40.0


@dataclass(frozen=True)
class Look:
    """Format, size and style of figures.

    Attributes:
        format: "png", "svg" or "pdf".
        width: inches.
        height: inches, or None for what suits each figure.
        style: as matplotlib.style.use takes it, on top of evenmoe's own: a name such as "dark_background", or a path
            of an .mplstyle file; None for evenmoe's own alone.

    Raises:
        ConstraintError: another format, or a size that is not from 2 to 40 inches.

    >>> Look("svg", width=3.3).format
    'svg'
    """

    format: str = "png"
    width: float = WIDTH
    height: float | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        require(self.format in FORMATS, "format", repr(self.format), f"must be one of {', '.join(FORMATS)}", "use one")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and not _LEAST <= value <= _MOST:
                raise ConstraintError(
                    name, value, f"must be from {_LEAST:g} to {_MOST:g} inches", "use 3.3 for a column"
                )
