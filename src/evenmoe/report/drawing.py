"""What drawings share: colors and line styles, axes, and runs of neighbors that are drawn as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evenmoe.report.markup import Markup, element, join

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
    """How one policy is drawn everywhere; the 7 colors and markers repeat with the 5 dashes after 35 policies."""

    color: int
    dash: tuple[float, ...]
    marker: Marker


def style(policy: int) -> Style:
    """The style of the policy with this index."""
    return Style(policy % len(SERIES_LIGHT), DASHES[policy % len(DASHES)], MARKERS[policy % len(MARKERS)])


def color_rules() -> str:
    """CSS that gives `.s0`… and `.h0`… their colors in both modes."""

    def rules(prefix: str, colors: tuple[str, ...]) -> str:
        return "".join(f".{prefix}{i}{{--c:{color}}}" for i, color in enumerate(colors))

    light = rules("s", SERIES_LIGHT) + rules("h", RAMP_LIGHT)
    dark = rules("s", SERIES_DARK) + rules("h", RAMP_DARK)
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}"


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low, high: its ends; high > low.
        ticks: values that carry a label.
        label: what it measures, with the unit.
        text: how a tick is written.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    text: Callable[[float], str]

    def share(self, value: float) -> float:
        """Where `value` lies, 0.0 at the low end and 1.0 at the high one."""
        return (value - self.low) / (self.high - self.low)


def nice_step(span: float, at_most: int) -> float:
    """The least of 1, 2, 5 times a power of ten that cuts `span` into at most `at_most` parts.

    >>> nice_step(0.9, 5), nice_step(1000, 5)
    (0.2, 200.0)
    """
    power = 10.0 ** math.floor(math.log10(span / at_most))
    return next(f * power for f in (1.0, 2.0, 5.0, 10.0, 20.0) if span <= f * power * at_most * (1 + 1e-9))


def value_axis(low: float, high: float, label: str, least: float, at_most: int = 5) -> Axis:
    """An axis from the multiple of a nice step at or below `low` to the one at or above `high`.

    Args:
        least: the span it has at least, so that a flat line does not fill the drawing with noise; > 0.
    """
    step = nice_step(max(high - low, least), at_most)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))

    def text(value: float) -> str:
        return f"{value:,.{decimals}f}".replace("-", "\u2212")

    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, label, text)


def par_axis(high: float) -> Axis:
    """From 1.0, the best that there is, to above `high`; other ticks are round numbers.

    >>> par_axis(1.43).ticks, par_axis(44.3).ticks
    ((1.0, 1.1, 1.2, 1.3, 1.4, 1.5), (1.0, 10.0, 20.0, 30.0, 40.0, 50.0))
    """
    axis = value_axis(1.0, max(high, 1.0), "PAR (busiest ÷ mean rank; 1 is perfect)", 0.05)
    step = axis.ticks[1] - axis.ticks[0]
    ticks = (1.0, *(tick for tick in axis.ticks if tick > 1.0 + step / 2 + 1e-9))
    return Axis(1.0, ticks[-1], ticks, axis.label, axis.text)


def index_axis(size: int, label: str, at_most: int = 5) -> Axis:
    """An axis over the items 0…size−1, each with a width of one; ticks at the middle of whole items."""
    step = max(1, round(nice_step(size, at_most) + 0.4))
    ticks = tuple(i + 0.5 for i in range(0, size, step))
    return Axis(0.0, float(size), ticks, label, lambda v: f"{round(v - 0.5):,}")


def percentage(value: float) -> str:
    """A share of the width for an SVG attribute."""
    return f"{100 * value:.2f}%"


def frame(x: Axis, y: Axis, height: float) -> Markup:
    """Grid lines at the ticks of y, and the labels of both axes."""
    parts = []
    for tick in y.ticks:
        at = f"{height * (1 - y.share(tick)):.1f}"
        parts.append(element("line", class_="level", x1="0", x2="100%", y1=at, y2=at))
        parts.append(element("text", y.text(tick), class_="tick end", x="-8", y=at, dy="4"))
    return join(*parts, bottom_labels(x, height), element("text", y.label, class_="axis", x="0", y="-14"))


def bottom_labels(x: Axis, height: float) -> Markup:
    """The ticks and the label below a drawing."""
    parts = []
    for tick in x.ticks:
        at = percentage(x.share(tick))
        parts.append(element("line", class_="notch", x1=at, x2=at, y1=height, y2=height + 4))
        parts.append(element("text", x.text(tick), class_="tick mid", x=at, y=height + 18))
    return join(*parts, element("text", x.label, class_="axis mid", x="50%", y=height + 36))


def drawing(
    body: str, key: str, title: str, description: str, height: float, *, max_width: float | None = None, kind: str = ""
) -> Markup:
    """The `<svg>` with its text alternative; `key` is unique on the page."""
    return element(
        "svg",
        element("title", title, id=f"{key}-t"),
        element("desc", description, id=f"{key}-d"),
        body,
        class_=f"plot {kind}".strip(),
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
        height=f"{height:g}",
        style=f"--w:{max_width:g}px" if max_width else None,
    )


def stretched(body: str, columns: float, rows: float, height: float) -> Markup:
    """A part of a drawing whose own units are stretched over its whole width."""
    return element(
        "svg",
        body,
        width="100%",
        height=f"{height:g}",
        viewBox=f"0 0 {columns:g} {rows:g}",
        preserveAspectRatio="none",
        overflow="visible",
    )


FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Buckets:
    """`size` items cut into `count` runs of neighbors, all but the last of `width` items.

    >>> Buckets.of(10, 4)
    Buckets(size=10, width=3)
    >>> Buckets.of(10, 4).count
    4
    """

    size: int
    width: int

    @classmethod
    def of(cls, size: int, at_most: int) -> Buckets:
        """Runs as narrow as they can be for at most `at_most` of them."""
        return cls(size, max(1, -(-size // at_most)))

    @property
    def count(self) -> int:
        return -(-self.size // self.width)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.arange(0, self.size, self.width)

    @property
    def middles(self) -> FloatArray:
        """The middle of every run, where item i lies from i to i + 1."""
        return (self.starts + np.minimum(self.starts + self.width, self.size)) / 2

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean of every run along the first axis."""
        lengths = np.diff(np.append(self.starts, self.size))
        return np.add.reduceat(values, self.starts) / lengths

    def highest(self, values: FloatArray, axis: int = 0) -> FloatArray:
        """Maximum of every run along `axis`."""
        return np.maximum.reduceat(values, self.starts, axis=axis)

    def lowest(self, values: FloatArray) -> FloatArray:
        """Minimum of every run along the first axis."""
        return np.minimum.reduceat(values, self.starts)

    def spread(self, axis: Axis) -> Axis:
        """An axis over the items that ends where the last run would end if it were full."""
        return replace(axis, high=float(self.count * self.width))
