"""Cells in a few colours: load by layer and rank, replicas by layer and expert."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.report.axes import Axis, bottom_labels, drawing, percentage, stretched
from evenmoe.report.markup import Markup, element, join

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
        levels: (rows, columns), the step of the colour ramp of each cell, `EMPTY` for none.
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
    """One path per level; neighbours of one row and level are one stroke, as thick as the row."""
    paths: dict[int, list[str]] = {}
    for row, values in enumerate(levels):
        ends = np.append(np.flatnonzero(values[1:] != values[:-1]) + 1, len(values)).tolist()
        start = 0
        for end in ends:
            paths.setdefault(int(values[start]), []).append(f"M{start} {row}.5h{end - start}")
            start = end
    paths.pop(EMPTY, None)
    return join(*(element("path", class_=f"cell h{level}", d="".join(paths[level])) for level in sorted(paths)))
