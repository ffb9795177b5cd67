"""Horizontal bars of at most two parts, each under its name and value."""

from __future__ import annotations

from dataclasses import dataclass

from evenmoe.report.axes import percentage
from evenmoe.report.markup import Markup, element, join

PITCH, THICKNESS, HEADING = 36, 13, 22  # px
PARTS = ("solid", "hollow")  # filled and outlined: told apart without colour


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: on its left, short.
        value: on its right, with the unit.
        shares: of the longest bar, one per part, each 0.0 to 1.0.
        colour: index into the series' colours.
        heading: above it, for it and those that follow; "" for none.
    """

    label: str
    value: str
    shares: tuple[float, ...]
    colour: int
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
                        class_=f"{kind} s{bar.colour}",
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
