"""HTML and SVG elements from Python, every text escaped; sections, figures and tables made of them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_VOID = {"meta", "br"}
# Controls, lone surrogates and non-characters have no place in HTML and would make it unreadable or unwritable.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def printable(text: str) -> str:
    """`text` with every character that HTML may not hold replaced by U+FFFD.

    >>> printable("a\\x00b")
    'a�b'
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def escape(text: str) -> Markup:
    """`text` as markup that shows it.

    >>> escape("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text), quote=True))


def join(*parts: str) -> Markup:
    """Parts behind each other, those escaped that are not markup yet."""
    return Markup("".join(escape(part) for part in parts))


def element(tag: str, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """`<tag attributes>children</tag>`.

    A trailing underscore of an attribute's name is dropped and the others become hyphens; None and False leave it out,
    True leaves its value out.

    >>> element("p", "1 < 2", class_="note", hidden=None)
    '<p class="note">1 &lt; 2</p>'
    """
    parts = [f"<{tag}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    if tag in _VOID:
        return Markup("".join([*parts, ">"]))
    return Markup("".join([*parts, ">", join(*children), f"</{tag}>"]))


def data(value: float, text: str) -> Markup:
    """A shown number beside the full one, which a program can read: `<data value=…>`.

    >>> data(1.23456, "1.23")
    '<data value="1.23456">1.23</data>'
    """
    return element("data", text, value=repr(value))


def name(text: str) -> Markup:
    """A name that somebody else chose; isolated, so that its writing direction cannot spill over.

    >>> name("<i>")
    '<bdi>&lt;i&gt;</bdi>'
    """
    return element("bdi", text)


def shortened(text: str, length: int) -> str:
    """At most `length` characters; an ellipsis stands for what is left out, nearer to the end than to the start.

    >>> shortened("evenmoe:rule=occurrence,slots=72", 20)
    'evenmoe:rul…slots=72'
    """
    text = " ".join(printable(text).split())
    if len(text) <= length:
        return text
    tail = 2 * length // 5
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


FITTING = 3  # columns that a page 400 px wide shows whole
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
    hint = "hinted" if len(columns) > FITTING else None
    return element(
        "div",
        element(
            "table",
            element("caption", element("span", caption), class_=hint),
            element("thead", head),
            element("tbody", *body),
        ),
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


def paragraph(*parts: str, class_: str | None = None) -> Markup:
    """A paragraph."""
    return element("p", join(*parts), class_=class_)
