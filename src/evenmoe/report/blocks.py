"""The parts that a page repeats: sections, figures, tables, legends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evenmoe.report.markup import Markup, element, join, name
from evenmoe.report.palette import style

LONG = 24  # characters, from which a row's heading is broken into lines
_TAGS = re.compile("<[^>]*>")


@dataclass(frozen=True)
class Column:
    """Head of a table's column.

    Attributes:
        label: what it holds.
        unit: under the label, "" for none.
        word: key of its definition in the glossary, "" for none.
        text: whether its cells are text, which is written from the left.
    """

    label: str
    unit: str = ""
    word: str = ""
    text: bool = False


def section(key: str, title: str, *body: str) -> Markup:
    """A numbered place of the page that can be linked to."""
    return element("section", element("h2", title), *body, id=key)


def figure(title: str, drawing: str, caption: str, *, legend: str = "", table: str = "", wide: bool = False) -> Markup:
    """A drawing with its heading, what its marks mean, its caption and, on request, its numbers."""
    return element(
        "figure",
        element("h3", title),
        legend,
        element("div", drawing, class_="canvas"),
        element("figcaption", caption),
        details("The numbers", table) if table else "",
        class_="wide" if wide else None,
    )


def details(summary: str, body: str) -> Markup:
    """A part that opens on request."""
    return element("details", element("summary", summary), body)


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row is its heading."""
    head = element("tr", *(_head(column) for column in columns))
    body = []
    for row in rows:
        long = len(_TAGS.sub("", row[0])) > LONG
        cells = [element("th", row[0], scope="row", class_="long" if long else None)]
        cells += [
            element("td", cell, class_="text" if column.text else None)
            for cell, column in zip(row[1:], columns[1:], strict=True)
        ]
        body.append(element("tr", *cells))
    return element(
        "div",
        element("table", element("caption", element("span", caption)), element("thead", head), element("tbody", *body)),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex="0",
    )


def _head(column: Column) -> Markup:
    label: str = column.label
    if column.word:
        label = element("a", label, href=f"#w-{column.word}")
    unit = element("span", column.unit, class_="unit") if column.unit else ""
    return element("th", label, unit, scope="col", class_="text" if column.text else None)


def swatch(policy: int) -> Markup:
    """A short piece of a policy's line."""
    look = style(policy)
    return element(
        "svg",
        element(
            "path",
            class_=f"line s{look.colour}",
            d="M1 7h34",
            stroke_dasharray=" ".join(f"{part:g}" for part in look.dash) or None,
        ),
        element("path", class_=f"mark s{look.colour}", d=look.marker.path, transform="translate(18 7)"),
        class_="swatch",
        width="36",
        height="14",
        aria_hidden="true",
    )


def lines_legend(policies: Sequence[tuple[int, str]]) -> Markup:
    """Which line is which: (index, name) of each policy."""
    return element(
        "ul",
        *(element("li", swatch(index), element("span", name(text))) for index, text in policies),
        class_="legend",
    )


def patches_legend(patches: Sequence[tuple[str, str]]) -> Markup:
    """What colours and fills mean: (CSS class, text) of each."""
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


def paragraph(*parts: str, class_: str | None = None) -> Markup:
    """A paragraph."""
    return element("p", join(*parts), class_=class_)
