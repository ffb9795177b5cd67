"""The sections with lines and bars of every policy: PAR over time, rows communicated, time, copies and memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evenmoe import quantities
from evenmoe.quantities import TIMES, common_unit, significant
from evenmoe.report.charts import (
    Bar,
    Line,
    bar_chart,
    bars_height,
    line_chart,
    patches_legend,
    ticks_below,
)
from evenmoe.report.content import Content
from evenmoe.report.drawing import Buckets, drawing, index_axis, par_axis, style, value_axis
from evenmoe.report.markup import Column, Markup, data, element, figure, join, name, section, shortened, table
from evenmoe.simulator.policy_result import PolicyResult

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
POINTS = 200  # of a line: on a page 1,200 px wide one every 6 px
ALL_HEIGHT, ONE_HEIGHT = 260, 150  # px
STROKES = 50  # refreshes that are marked one by one at most; more would touch each other on a phone


def balance(content: Content) -> Markup:
    """All policies together, those that are crowded below the baseline once more, then those to look at with the range
    of their layers."""
    policies = list(enumerate(content.simulation.policies))
    if len(policies) == 1:
        alone = _alone(content, 0, content.before, float(content.before.par.max()))
        return section("balance", "Balance over time", alone, _numbers(policies))
    figures = [_together(content, policies, "par", "PAR of every policy over time")]
    medians = [float(np.median(policy.par, axis=1).max()) - 1.0 for _, policy in policies]
    if len(policies) > 2 and medians[0] > 2.0 * max(medians[1:]):
        title = f"The same without {content.before.name}, enlarged"
        figures.append(_together(content, policies[1:], "par-zoom", title))
    policies = [policies[index] for index in content.focus]
    tops = [float(policy.par.max()) for _, policy in policies]
    if len(figures) > 1:  # the baseline would press the others flat here too
        tops[1:] = [max(tops[1:], default=1.0)] * (len(tops) - 1)
    else:
        tops = [max(tops)] * len(tops)
    alone = [_alone(content, index, policy, top) for (index, policy), top in zip(policies, tops, strict=True)]
    return section(
        "balance",
        "Balance over time",
        element("div", *figures, class_="grid"),
        element("div", *alone, class_="grid small"),
    )


def buckets(content: Content) -> Buckets:
    """The runs of steps that are drawn as one point."""
    return Buckets.of(content.summary.num_steps, POINTS)


def averaged(runs: Buckets) -> str:
    """A sentence for a caption: how many steps a point stands for."""
    return "" if runs.width == 1 else f" Each point is the mean of {runs.width} consecutive steps."


def _line(content: Content, index: int, policy: PolicyResult, *, band: bool) -> Line:
    runs = buckets(content)
    return Line(
        policy.name,
        index,
        style(index),
        runs.middles,
        runs.mean(np.median(policy.par, axis=1)),
        runs.lowest(policy.par.min(axis=1)) if band else None,
        runs.highest(policy.par.max(axis=1)) if band else None,
        quiet=not band and index not in content.focus,
    )


def _together(content: Content, policies: Sequence[tuple[int, PolicyResult]], key: str, title: str) -> Markup:
    lines = [_line(content, index, policy, band=False) for index, policy in policies]
    x, y = index_axis(content.summary.num_steps, "step"), par_axis(max(float(line.y.max()) for line in lines))
    means = ", ".join(
        f"{policy.name} {quantities.par(float(np.median(policy.par, axis=1).mean()))}" for _, policy in policies
    )
    steps = quantities.counted(content.summary.num_steps, "step")
    description = f"Lines over {steps}. Mean over time of the median layer: {means}."
    caption = (
        f"Peak-to-average load of the median layer at every step; lower is better.{averaged(buckets(content))}"
        f"{_shaded(content)}"
    )
    legend = content.legend([index for index, _ in policies])
    numbers = _numbers(policies) if policies[0][0] == 0 else ""  # an enlarged part has no numbers of its own
    chart = line_chart(lines, x, y, ALL_HEIGHT, warmup=content.simulation.judged.start)
    svg = drawing(chart, key, title, description, ALL_HEIGHT, kind="named")
    return figure(title, svg, caption, legend=legend, table=numbers, wide=True)


def _shaded(content: Content) -> str:
    warmup = content.simulation.judged.start
    return f" Shaded: {quantities.counted(warmup, 'step')} of warm-up, of which no figure is." if warmup else ""


def _numbers(policies: Sequence[tuple[int, PolicyResult]]) -> Markup:
    columns = [
        Column("Policy"),
        *(Column(label, "PAR") for label in ("First step", "Mean", "Lowest", "Highest", "Last")),
    ]
    rows = []
    for _, policy in policies:
        median = np.median(policy.par, axis=1)
        values = (median[0], median.mean(), median.min(), median.max(), median[-1])
        rows.append((name(policy.name), *(data(float(v), quantities.par(float(v))) for v in values)))
    return table("PAR of the median layer, by step", columns, rows)


def _alone(content: Content, index: int, policy: PolicyResult, top: float) -> Markup:
    line = _line(content, index, policy, band=True)
    x, y = index_axis(content.summary.num_steps, "step", at_most=4), par_axis(top)
    body, refreshes = line_chart([line], x, y, ONE_HEIGHT, warmup=content.simulation.judged.start), ""
    if 0 < len(policy.refreshes) <= STROKES:
        body = join(body, ticks_below(policy.refreshes, x, ONE_HEIGHT))
        refreshes = "; strokes on the axis: refreshes"
    low, high = quantities.par(float(policy.par.min())), quantities.par(float(policy.par.max()))
    description = f"The median layer's PAR over time within the range of all layers, which lies from {low} to {high}."
    caption = f"Line: median layer. Band: from the best to the worst layer, {low} to {high}{refreshes}."
    if top > float(policy.par.max()) or index:
        caption += " Same scale as its neighbors."
    svg = drawing(body, f"par-{index}", f"PAR of {policy.name}: median and range", description, ONE_HEIGHT)
    return figure(policy.name, svg, caption)


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
    simulation, judged = content.simulation, content.simulation.judged
    base = np.cumsum(simulation.net_times(content.before))
    runs = Buckets.of(len(base), POINTS)
    others = list(enumerate(simulation.policies))[1:]
    saved = [base - np.cumsum(simulation.net_times(policy)) for _, policy in others]
    unit = common_unit([float(np.abs(values).max()) for values in saved], TIMES)
    lines = []
    for (i, policy), values in zip(others, saved, strict=True):
        # A running total is read off at the end of a run of steps; an average would lag behind it.
        ends = np.append(runs.starts[1:], len(base))
        x, y = np.append(0, ends) + float(judged.start), np.append(0.0, values[ends - 1]) / unit.size
        lines.append(Line(policy.name, i, style(i), x, y, quiet=i not in content.focus))
    low, high = min(float(line.y.min()) for line in lines), max(float(line.y.max()) for line in lines)
    y = value_axis(low, high, f"time saved so far ({unit.name})", max(high - low, 1e-3))
    title = f"Time saved over {content.before.name}"
    listing = "; ".join(
        f"{policy.name} {significant(line.y[-1])}" for (_, policy), line in zip(others, lines, strict=True)
    )
    x = index_axis(content.summary.num_steps, "step")
    svg = drawing(
        line_chart(lines, x, y, SAVED_HEIGHT, zero=True, warmup=judged.start),
        "saved", title, f"Running totals over the judged steps. {unit.name} after the last: {listing}.", SAVED_HEIGHT,
        kind="named",
    )  # fmt: skip
    caption = (
        "Running total of what the judged steps take less than the baseline's, copying included; those of the first "
        f"plan are spread over {quantities.counted(simulation.horizon_steps, 'step')}.{_shaded(content)}"
        f"{averaged(runs).replace('mean', 'end')}"
    )
    return figure(title, svg, caption, legend=content.legend([i for i, _ in others]), wide=True)
