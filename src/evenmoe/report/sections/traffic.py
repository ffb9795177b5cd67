"""Rows on the wire, within and between nodes."""

from __future__ import annotations

from evenmoe.report.axes import drawing
from evenmoe.report.bar_chart import Bar, bar_chart, bars_height
from evenmoe.report.blocks import Column, figure, patches_legend, section, table
from evenmoe.report.content import Content
from evenmoe.report.markup import Markup, data, name, shortened
from evenmoe.report.palette import style
from evenmoe.report.quantities import ROWS, Unit, common_unit, significant
from evenmoe.report.summary import Summary


def traffic(content: Content) -> Markup:
    """Bars per policy, as routed and with one row per token and rank."""
    totals = [total for summary in content.summaries for total in _totals(summary)]
    unit = common_unit(totals, ROWS)
    longest = max(totals) or 1.0
    bars = [bar for i, summary in enumerate(content.summaries) for bar in _bars(i, summary, longest, unit)]
    height = bars_height(bars)
    title = "Rows that leave their rank"
    svg = drawing(
        bar_chart(bars), "rows", title, "Mean per step of every policy; the table below holds the numbers.", height,
        kind="bars",
    )  # fmt: skip
    caption = (
        "Mean per step over all layers, on the way to the experts; as many come back. Per expert: a row for each token "
        "and expert. Per rank: a row for each token and destination rank, however many of its experts are there. "
        "Rows of a token that stay on their rank are not counted."
    )
    legend = patches_legend([("solid s0", "within a node"), ("hollow s0", "between nodes")])
    chart = figure(title, svg, caption, legend=legend, wide=True)
    return section("traffic", "Traffic", chart, _numbers(content, unit))


def _totals(summary: Summary) -> tuple[float, float]:
    rows = summary.rows
    return rows.within_node + rows.between_nodes, rows.within_node_once + rows.between_nodes_once


def _bars(index: int, summary: Summary, longest: float, unit: Unit) -> list[Bar]:
    rows = summary.rows
    return [
        Bar(
            kind,
            f"{significant((within + between) / unit.size)} {unit.name}",
            (within / longest, between / longest),
            style(index).colour,
            heading,
        )
        for kind, heading, within, between in (
            ("one row per expert", shortened(summary.name, 24), rows.within_node, rows.between_nodes),
            ("one row per rank", "", rows.within_node_once, rows.between_nodes_once),
        )
    ]


def _numbers(content: Content, unit: Unit) -> Markup:
    label = f"{unit.name} per step"
    columns = [
        Column("Policy"),
        Column("Within nodes, per expert", label, "row"),
        Column("Between nodes, per expert", label, "row"),
        Column("Within nodes, per rank", label, "row"),
        Column("Between nodes, per rank", label, "row"),
        Column("Saved by one row per rank", "% of rows", "row"),
    ]
    lines = []
    for summary in content.summaries:
        rows = summary.rows
        values = (rows.within_node, rows.between_nodes, rows.within_node_once, rows.between_nodes_once)
        full, once = _totals(summary)
        saved = 100.0 * (1.0 - once / full) if full else 0.0
        lines.append(
            (
                name(summary.name),
                *(data(value, significant(value / unit.size)) for value in values),
                data(saved, f"{significant(saved)}\u00a0%"),
            )
        )
    return table("Rows on the wire, mean per step", columns, lines)
