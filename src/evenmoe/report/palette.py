"""Colours, dashes and markers, shared by the page and the PNGs.

Lines differ in dash and marker as well, and only much is far from the paper in lightness, so that the page can be read
without seeing colours.
Hues after Okabe and Ito (jfly.uni-koeln.de/color), darkened or lightened until they stand out from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Lines and bars, on light and on dark paper; the first is the baseline's.
SERIES_LIGHT = ("#5b6470", "#0b62a8", "#b3430a", "#0a7257", "#8b3a91", "#7d5a00", "#b01e5a")
SERIES_DARK = ("#aab3bf", "#6fb7ff", "#ff9d5c", "#4fd3ae", "#dd9be6", "#e6c24a", "#ff87b2")

#: Cells from little over the middle (index 3), which is as good as the paper, to much, which stands out most.
RAMP_LIGHT = ("#86aedb", "#b3cfec", "#dbe8f5", "#faf8f1", "#fbdca6", "#f3aa58", "#dc6b2b", "#ad3135", "#5f123e")
RAMP_DARK = ("#3d74a6", "#2d5577", "#243e53", "#1d252d", "#5a4520", "#966520", "#d0842b", "#f3ad52", "#ffe6b8")


@dataclass(frozen=True)
class Marker:
    """One shape, about 8 px wide around the origin, and matplotlib's name for it."""

    path: str
    matplotlib: str


MARKERS = (
    Marker("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "o"),
    Marker("M-3.5-3.5h7v7h-7z", "s"),
    Marker("M0-4.5L4.5 3.5h-9z", "^"),
    Marker("M0-5L5 0 0 5-5 0z", "D"),
    Marker("M-4-1.5h2.5V-4h3v2.5H4v3H1.5V4h-3V1.5H-4z", "P"),
    Marker("M0 4.5L4.5-3.5h-9z", "v"),
    Marker("M0-5L1.5-1.6 5-1.4 2.3.9 3.2 4.4 0 2.5-3.2 4.4-2.3.9-5-1.4-1.5-1.6z", "*"),
)
DASHES = ((), (7.0, 3.0), (2.0, 3.0), (9.0, 3.0, 2.0, 3.0), (12.0, 4.0))


@dataclass(frozen=True)
class Style:
    """How one policy is drawn everywhere; the 7 colours and markers repeat with the 5 dashes after 35 policies."""

    colour: int
    dash: tuple[float, ...]
    marker: Marker


def style(policy: int) -> Style:
    """The style of the policy with this index."""
    return Style(policy % len(SERIES_LIGHT), DASHES[policy % len(DASHES)], MARKERS[policy % len(MARKERS)])


def colour_rules() -> str:
    """CSS that gives `.s0`… and `.h0`… their colours in both modes."""

    def rules(prefix: str, colours: tuple[str, ...]) -> str:
        return "".join(f".{prefix}{i}{{--c:{colour}}}" for i, colour in enumerate(colours))

    light = rules("s", SERIES_LIGHT) + rules("h", RAMP_LIGHT)
    dark = rules("s", SERIES_DARK) + rules("h", RAMP_DARK)
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}"
