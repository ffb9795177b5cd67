"""Figures of a simulation as tables of other programs: pandas' data frames, and HTML for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    import pandas

_CELL = "text-align:right;font-variant-numeric:tabular-nums"


def data_frame(columns: Mapping[str, object], index: str) -> pandas.DataFrame:
    """A data frame of these columns, of which `index` becomes the index.

    Raises:
        ConstraintError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ConstraintError(
            "pandas", "not installed", "is needed for data frames", "run `pip install pandas`, or use to_dict()"
        ) from None
    return pandas.DataFrame(columns).set_index(index)


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table as HTML, everything escaped; the first cell of a row is its head.

    >>> html_table("a < b", ["policy", "PAR"], [["one", "1.5"]]).count("a &lt; b")
    1
    """
    head = "".join(f'<th scope="col" style="{_CELL if i else "text-align:left"}">{escape(text)}</th>'
                   for i, text in enumerate(heads))  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(row[0])}</th>'
        + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f'<table><caption style="text-align:left">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{below}"
    )
