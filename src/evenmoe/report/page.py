"""The page: head, sections, style."""

from __future__ import annotations

from importlib.resources import files

from evenmoe.report.content import Content
from evenmoe.report.markup import Markup, element, join, name
from evenmoe.report.palette import colour_rules
from evenmoe.report.quantities import count, counted
from evenmoe.report.sections.balance import balance
from evenmoe.report.sections.cost import cost
from evenmoe.report.sections.headline import headline
from evenmoe.report.sections.load import load
from evenmoe.report.sections.origin import glossary, origin
from evenmoe.report.sections.replicas import replicas
from evenmoe.report.sections.traffic import traffic

#: Nothing may be fetched or run; styles stand in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LINKS = (
    ("balance", "Balance"),
    ("load", "Load"),
    ("replicas", "Replicas"),
    ("layers", "Worst layers"),
    ("traffic", "Traffic"),
    ("cost", "Cost"),
    ("settings", "Settings"),
    ("origin", "Origin"),
    ("words", "Words"),
)


def page(content: Content) -> str:
    """The whole document."""
    style = files("evenmoe.report").joinpath("page.css").read_text(encoding="utf-8") + colour_rules()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{content.simulation.trace}: balance report of evenmoe"),
        element("style", Markup(style)),
    )
    body = element("body", _header(content), element("main", _sections(content)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _header(content: Content) -> Markup:
    simulation = content.simulation
    tokens = simulation.tokens
    low, high = count(int(tokens.min())), count(int(tokens.max()))
    facts = (
        counted(content.num_layers, "MoE layer"),
        f"{counted(simulation.num_experts, 'expert')}, top-{simulation.top_k}",
        f"{counted(simulation.num_ranks, 'rank')}, {counted(simulation.num_nodes, 'node')}",
        f"{counted(len(tokens), 'step')} of {low if low == high else f'{low} to {high}'} tokens",
    )
    return element(
        "header",
        element("p", "evenmoe · balance report", class_="brand"),
        element("h1", name(simulation.trace)),
        element("ul", *(element("li", fact) for fact in facts), class_="facts"),
        element("nav", *(element("a", text, href=f"#{key}") for key, text in LINKS), aria_label="Sections"),
    )


def _sections(content: Content) -> Markup:
    parts = (headline, balance, load, replicas, traffic, cost, origin)
    return join(*(part(content) for part in parts), glossary())
