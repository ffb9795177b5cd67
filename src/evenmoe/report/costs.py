"""Rows communicated, time, copies and memory of every policy."""

from __future__ import annotations

import numpy as np

from evenmoe.quantities import TIMES, common_unit, significant
from evenmoe.report.balance import averaged, buckets
from evenmoe.report.charts import Bar, Line, bar_chart, bars_height, line_chart, lines_legend, patches_legend
from evenmoe.report.content import Content
from evenmoe.report.drawing import drawing, index_axis, style, value_axis
from evenmoe.report.markup import Markup, element, figure, section, shortened

SAVED_HEIGHT = 240  # px
#: Figures in the tables of the two sections.
TRAFFIC = (
    "rows_within_node", "rows_between_nodes", "deduplicated_rows_within_node", "deduplicated_rows_between_nodes",
    "deduplication_percent",
)  # fmt: skip
COSTS = (
    "net_time_us", "total_copy_time_us", "copies", "refreshes", "copies_per_refresh", "break_even_steps",
    "memory_bytes_per_rank", "extra_memory_bytes_per_rank",
)  # fmt: skip


def traffic(content: Content) -> Markup:
    """Bars per policy, as routed and with one row per token and rank."""
    longest = max(total for summary in content.summaries for total in (summary.rows, summary.deduplicated_rows)) or 1.0
    bars = [bar for i in range(len(content.summaries)) for bar in _row_bars(content, i, longest)]
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
    return section("traffic", "Traffic", chart, content.table("Token rows communicated", TRAFFIC))


def _row_bars(content: Content, index: int, longest: float) -> list[Bar]:
    summary, shown = content.summaries[index], content.summary.shown("rows_within_node")
    return [
        Bar(
            kind,
            f"{significant((within + between) / shown.size)} {shown.unit.removesuffix(' per step')}",
            (within / longest, between / longest),
            style(index).color,
            heading,
        )
        for kind, heading, within, between in (
            ("one row per expert", shortened(summary.name, 24), summary.rows_within_node, summary.rows_between_nodes),
            ("one row per rank", "",
             summary.deduplicated_rows_within_node, summary.deduplicated_rows_between_nodes),
        )
    ]  # fmt: skip


def cost(content: Content) -> Markup:
    """Time per step, time saved so far, and a table of all costs."""
    figures = [_time(content)]
    if len(content.summaries) > 1:
        figures.append(_saved(content))
    body = element("div", *figures, class_="grid")
    numbers = content.table("Costs by the model in the settings", COSTS)
    return section("cost", "Time, copies and memory", body, numbers)


def _time(content: Content) -> Markup:
    summaries = content.summaries
    longest = max(summary.net_time_us for summary in summaries) or 1.0
    bars = []
    for i, (summary, value) in enumerate(zip(summaries, content.with_unit("net_time_us"), strict=True)):
        shares = (summary.step_time_us / longest, summary.copy_time_us / longest)
        bars.append(Bar(shortened(summary.name, 24), value, shares, style(i).color))
    height = bars_height(bars)
    title = "Mean time per step"
    listing = "; ".join(f"{summary.name} {bar.value}" for summary, bar in zip(summaries, bars, strict=True))
    reference = summaries[0].net_time_us / longest
    svg = drawing(bar_chart(bars, reference), "time", title, f"{listing}.", height, kind="bars")
    legend = patches_legend([("solid s0", "expert layers and exchange"), ("hollow s0", "copying experts")])
    caption = f"By the cost model in the settings; lower is better. Upright stroke: {content.before.name}."
    return figure(title, svg, caption, legend=legend, wide=True)


def _saved(content: Content) -> Markup:
    runs = buckets(content)
    base = np.cumsum(content.before.step_time + content.before.copy_time)
    others = list(enumerate(content.simulation.policies))[1:]
    saved = [base - np.cumsum(policy.step_time + policy.copy_time) for _, policy in others]
    unit = common_unit([float(np.abs(values).max()) for values in saved], TIMES)
    lines = []
    for (i, policy), values in zip(others, saved, strict=True):
        # A running total is read off at the end of a run of steps; an average would lag behind it.
        ends = np.append(runs.starts[1:], content.summary.num_steps)
        x = np.append(0.0, ends.astype(np.float64))
        lines.append(Line(policy.name, i, style(i), x, np.append(0.0, values[ends - 1]) / unit.size))
    low, high = min(float(line.y.min()) for line in lines), max(float(line.y.max()) for line in lines)
    y = value_axis(low, high, f"time saved so far ({unit.name})", max(high - low, 1e-3))
    title = f"Time saved over {content.before.name}"
    ends = "; ".join(
        f"{policy.name} {significant(line.y[-1])}" for (_, policy), line in zip(others, lines, strict=True)
    )
    svg = drawing(
        line_chart(lines, index_axis(content.summary.num_steps, "step"), y, SAVED_HEIGHT, zero=True),
        "saved", title, f"Running totals over steps. {unit.name} after the last step: {ends}.", SAVED_HEIGHT,
        kind="named",
    )  # fmt: skip
    caption = (
        "Running total of step and copying time less than the baseline's; above zero a policy has paid for all its "
        f"copies so far.{averaged(runs).replace('mean', 'end')}"
    )
    return figure(title, svg, caption, legend=lines_legend([(i, policy.name) for i, policy in others]), wide=True)
