"""A page as a tree, by the standard library's parser: tables by caption, and whether every tag is closed in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "") -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                if tag in ("", child.tag):
                    yield child
                yield from child.all(tag)

    def one(self, tag: str) -> Node:
        return next(self.all(tag))


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    """The tree; AssertionError where a tag is left open, closed twice or crossed by another."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert [node.tag for node in parser.open] == [""]
    return parser.open[0]


@dataclass(frozen=True)
class Cell:
    """What is shown, and the full value behind it (None where it is no number)."""

    shown: str
    value: float | None


def table(root: Node, caption: str) -> list[list[Cell]]:
    """The body of the one table with this caption."""
    (found,) = [node for node in root.all("table") if node.one("caption").text == caption]
    return [
        [_cell(cell) for cell in row.children if isinstance(cell, Node)]
        for row in found.one("tbody").children
        if isinstance(row, Node)
    ]


def _cell(node: Node) -> Cell:
    values = [float(data.attributes["value"] or "") for data in node.all("data")]
    return Cell(node.text, values[0] if values else None)
