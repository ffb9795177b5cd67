"""Lines over steps, one per policy, with their range as a band and their names at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.report.axes import Axis, frame, percentage, stretched
from evenmoe.report.markup import Markup, element, join, shortened
from evenmoe.report.palette import Style

FloatArray = npt.NDArray[np.float64]
UNITS = 1000  # across the stretched part: a tenth of a per cent of the width
MARKERS = 7  # on a line, shifted from policy to policy so that they do not hide each other
LABEL_HEIGHT = 15  # px, of the names at the ends


@dataclass(frozen=True)
class Line:
    """One policy's line: float64 (P,) each, in the axes' units.

    Attributes:
        name: written at its end.
        index: of the policy; it shifts the markers.
        style: colour, dash and marker.
        x, y: the points.
        low, high: the band, or None.
    """

    name: str
    index: int
    style: Style
    x: FloatArray
    y: FloatArray
    low: FloatArray | None = None
    high: FloatArray | None = None


def line_chart(lines: list[Line], x: Axis, y: Axis, height: float, *, zero: bool = False) -> Markup:
    """The inside of a drawing: frame, bands, lines, markers and names.

    Args:
        zero: whether y = 0 is drawn as a line of its own.
    """
    paths, marks = [], []
    for line in lines:
        colour = f"s{line.style.colour}"
        if line.low is not None and line.high is not None:
            paths.append(element("path", class_=f"band {colour}", d=_band(line, x, y, height)))
        paths.append(
            element(
                "path",
                class_=f"line {colour}",
                d=_path(_points(line.x, line.y, x, y, height)),
                stroke_dasharray=" ".join(f"{part:g}" for part in line.style.dash) or None,
            )
        )
        marks.append(_markers(line, len(lines), x, y, height))
    parts = [frame(x, y, height)]
    if zero:
        at = f"{height * (1 - y.share(0.0)):.1f}"
        parts.append(element("line", class_="zero", x1="0", x2="100%", y1=at, y2=at))
    return join(*parts, stretched(join(*paths), UNITS, height, height), *marks, _names(lines, y, height))


def ticks_below(steps: npt.NDArray[np.int64], x: Axis, height: float) -> Markup:
    """Short strokes on the axis before each of `steps`."""
    path = "".join(f"M{UNITS * x.share(step):.1f} {height:g}v-7" for step in steps.tolist())
    return stretched(element("path", class_="refresh", d=path), UNITS, height, height) if path else Markup()


def _points(across: FloatArray, up: FloatArray, x: Axis, y: Axis, height: float) -> list[str]:
    points = zip(across.tolist(), up.tolist(), strict=True)
    return [f"{UNITS * x.share(column):.1f} {height * (1 - y.share(row)):.1f}" for column, row in points]


def _path(points: list[str]) -> str:
    return "M" + "L".join(points)


def _band(line: Line, x: Axis, y: Axis, height: float) -> str:
    assert line.low is not None
    assert line.high is not None
    across, low, high = line.x, line.low, line.high
    if len(across) == 1:  # a single step: as wide as the whole drawing
        across, low, high = np.array([x.low, x.high]), np.repeat(low, 2), np.repeat(high, 2)
    there = _points(across, high, x, y, height)
    back = _points(across[::-1], low[::-1], x, y, height)
    return _path(there + back) + "z"


def _markers(line: Line, lines: int, x: Axis, y: Axis, height: float) -> Markup:
    count = len(line.x)
    if count <= MARKERS:
        chosen = np.arange(count)
    else:
        shift = (line.index % max(lines, 1)) / max(lines, 1)
        chosen = np.unique(((np.arange(MARKERS) + 0.25 + shift / 2) * count / MARKERS).astype(np.int64))
    return join(
        *(
            element(
                "svg",
                element("path", class_=f"mark s{line.style.colour}", d=line.style.marker.path),
                x=percentage(x.share(float(line.x[i]))),
                y=f"{height * (1 - y.share(float(line.y[i]))):.1f}",
                overflow="visible",
            )
            for i in chosen.tolist()
        )
    )


def _names(lines: list[Line], y: Axis, height: float) -> Markup:
    """Names at the right ends, pushed apart where they would overlap; hidden by the style sheet on narrow pages."""
    if len(lines) < 2 or len(lines) * LABEL_HEIGHT > height + 2 * LABEL_HEIGHT:
        return Markup()
    wanted = [height * (1 - y.share(float(line.y[-1]))) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: wanted[i])
    places, above = {}, -np.inf
    for i in order:
        above = places[i] = max(wanted[i], above + LABEL_HEIGHT)
    below = height + LABEL_HEIGHT
    for i in reversed(order):
        below = places[i] = min(places[i], below - LABEL_HEIGHT)
    return join(
        *(
            element(
                "svg",
                element("path", class_=f"mark s{line.style.colour}", d=line.style.marker.path),
                element("text", shortened(line.name, 24), x="9", y="4"),
                class_="name",
                x="100%",
                y=f"{places[i]:.1f}",
                overflow="visible",
            )
            for i, line in enumerate(lines)
        )
    )
