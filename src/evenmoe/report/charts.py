"""Bars, lines and maps as SVG, and their legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.report.drawing import Axis, Style, bottom_labels, drawing, frame, percentage, stretched, style
from evenmoe.report.markup import Markup, element, join, name, shortened

PITCH, THICKNESS, HEADING = 36, 13, 22  # px
PARTS = ("solid", "hollow")  # filled and outlined: told apart without color


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: on its left, short.
        value: on its right, with the unit.
        shares: of the longest bar, one per part, each 0.0 to 1.0.
        color: index into the series' colors.
        heading: above it, for it and those that follow; "" for none.
    """

    label: str
    value: str
    shares: tuple[float, ...]
    color: int
    heading: str = ""


def bars_height(bars: list[Bar]) -> int:
    """Pixels that `bar_chart` needs."""
    return sum(PITCH + HEADING * bool(bar.heading) for bar in bars)


def bar_chart(bars: list[Bar], reference: float | None = None) -> Markup:
    """The inside of a drawing; `reference`, a share of the width, is marked on every bar."""
    parts: list[str] = []
    top = 0
    for bar in bars:
        if bar.heading:
            parts.append(element("text", bar.heading, class_="heading", x="0", y=top + 16))
            top += HEADING
        parts.append(element("text", bar.label, class_="label", x="0", y=top + 14))
        parts.append(element("text", bar.value, class_="tick end", x="100%", y=top + 14))
        left = 0.0
        for kind, share in zip(PARTS, bar.shares, strict=False):
            if share > 0:
                parts.append(
                    element(
                        "rect",
                        class_=f"{kind} s{bar.color}",
                        x=percentage(left),
                        y=top + 19,
                        width=percentage(share),
                        height=THICKNESS,
                    )
                )
            left += share
        if reference is not None:
            at = percentage(reference)
            parts.append(element("line", class_="reference", x1=at, x2=at, y1=top + 17, y2=top + 34))
        parts.append(element("line", class_="base", x1="0", x2="0", y1=top + 17, y2=top + 34))
        top += PITCH
    return join(*parts)


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
        style: color, dash and marker.
        x, y: the points.
        low, high: the band, or None.
        quiet: whether it is drawn thin and gray behind the others, without a name.
    """

    name: str
    index: int
    style: Style
    x: FloatArray
    y: FloatArray
    low: FloatArray | None = None
    high: FloatArray | None = None
    quiet: bool = False


def line_chart(
    lines: list[Line], x: Axis, y: Axis, height: float, *, zero: bool = False, warmup: float = 0.0
) -> Markup:
    """The inside of a drawing: frame, bands, lines, markers and names.

    Args:
        zero: whether y = 0 is drawn as a line of its own.
        warmup: steps of warm-up, which are shaded.
    """
    paths, marks = [], []
    for line in sorted(lines, key=lambda line: not line.quiet):
        if line.quiet:
            points = _path(_points(line.x, line.y, x, y, height))
            paths.append(element("path", class_="line quiet", d=points))
            continue
        color = f"s{line.style.color}"
        if line.low is not None and line.high is not None:
            paths.append(element("path", class_=f"band {color}", d=_band(line, x, y, height)))
        paths.append(
            element(
                "path",
                class_=f"line {color}",
                d=_path(_points(line.x, line.y, x, y, height)),
                stroke_dasharray=" ".join(f"{part:g}" for part in line.style.dash) or None,
            )
        )
        marks.append(_markers(line, len(lines), x, y, height))
    parts = [frame(x, y, height)]
    if warmup:
        width = percentage(x.share(warmup))
        parts.insert(0, element("rect", class_="warmup", x="0", y="0", width=width, height=f"{height:g}"))
    if zero:
        at = f"{height * (1 - y.share(0.0)):.1f}"
        parts.append(element("line", class_="zero", x1="0", x2="100%", y1=at, y2=at))
    return join(
        *parts,
        stretched(join(*paths), UNITS, height, height),
        *marks,
        _names([line for line in lines if not line.quiet], y, height),
    )


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
                element("path", class_=f"mark s{line.style.color}", d=line.style.marker.path),
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
                element("path", class_=f"mark s{line.style.color}", d=line.style.marker.path),
                element("text", shortened(line.name, 24), x="9", y="4"),
                class_="name",
                x="100%",
                y=f"{places[i]:.1f}",
                overflow="visible",
            )
            for i, line in enumerate(lines)
        )
    )


IntArray = npt.NDArray[np.int64]
EMPTY = -1  # the level of a cell that is left blank


def heat_map(
    levels: IntArray,
    x: Axis,
    y: Axis,
    key: str,
    title: str,
    description: str,
    *,
    dividers: tuple[float, ...] = (),
    ruled: bool = False,
) -> Markup:
    """A drawing of one cell per entry of `levels`, row 0 on top.

    Args:
        levels: (rows, columns), the step of the color ramp of each cell, `EMPTY` for none.
        x, y: `index_axis`es; y's ticks are written beside the rows.
        dividers: x values at which a line is drawn from top to bottom.
        ruled: whether a thin gap parts the rows.
    """
    rows, columns = levels.shape
    height = row_height(rows) * rows
    parts = [stretched(_cells(levels), columns, rows, height)]
    if ruled:
        path = "".join(f"M0 {row}h{columns}" for row in range(1, rows))
        parts.append(stretched(element("path", class_="gap", d=path), columns, rows, height))
    parts.append(element("rect", class_="frame", x="0", y="0", width="100%", height=f"{height:g}"))
    for value in dividers:
        at = percentage(x.share(value))
        parts.append(element("line", class_="divider", x1=at, x2=at, y1="0", y2=f"{height:g}"))
    for tick in y.ticks:
        at = f"{height * y.share(tick):.1f}"
        parts.append(element("text", y.text(tick), class_="tick end", x="-8", y=at, dy="4"))
    parts.append(element("text", y.label, class_="axis", x="0", y="-10"))
    parts.append(bottom_labels(x, height))
    return drawing(join(*parts), key, title, description, height, max_width=max(56 * columns, 120), kind="cells")


def row_height(rows: int) -> float:
    """Pixels per row: 18 for a few, less for many, so that the whole is about 300 px high."""
    return float(np.clip(300 / rows, 2, 18))


def _cells(levels: IntArray) -> Markup:
    """One path per level; neighbors of one row and level are one stroke, as thick as the row."""
    paths: dict[int, list[str]] = {}
    for row, values in enumerate(levels):
        ends = np.append(np.flatnonzero(values[1:] != values[:-1]) + 1, len(values)).tolist()
        start = 0
        for end in ends:
            paths.setdefault(int(values[start]), []).append(f"M{start} {row}.5h{end - start}")
            start = end
    paths.pop(EMPTY, None)
    return join(*(element("path", class_=f"cell h{level}", d="".join(paths[level])) for level in sorted(paths)))


def swatch(policy: int) -> Markup:
    """A short piece of a policy's line."""
    look = style(policy)
    return element(
        "svg",
        element(
            "path",
            class_=f"line s{look.color}",
            d="M1 7h34",
            stroke_dasharray=" ".join(f"{part:g}" for part in look.dash) or None,
        ),
        element("path", class_=f"mark s{look.color}", d=look.marker.path, transform="translate(18 7)"),
        class_="swatch",
        width="36",
        height="14",
        aria_hidden="true",
    )


def lines_legend(policies: Sequence[tuple[int, str]], *, others: bool = False) -> Markup:
    """Which line is which: (index, name) of each policy; `others` are thin and gray."""
    items = [element("li", swatch(index), element("span", name(text))) for index, text in policies]
    if others:
        thin = element("path", class_="line quiet", d="M1 7h34")
        gray = element("svg", thin, class_="swatch", width="36", height="14", aria_hidden="true")
        items.append(element("li", gray, element("span", "other policies")))
    return element("ul", *items, class_="legend")


def patches_legend(patches: Sequence[tuple[str, str]]) -> Markup:
    """What colors and fills mean: (CSS class, text) of each."""
    items = []
    for class_, text in patches:
        patch = element(
            "svg",
            element("rect", class_=class_, x="1", y="1", width="18", height="12"),
            class_="swatch",
            width="20",
            height="14",
            aria_hidden="true",
        )
        items.append(element("li", patch, element("span", text)))
    return element("ul", *items, class_="legend")
