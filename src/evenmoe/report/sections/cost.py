"""What a step takes, what copying takes, and when a refresh has paid for itself."""

from __future__ import annotations

import numpy as np

from evenmoe.report import quantities
from evenmoe.report.axes import drawing, index_axis, value_axis
from evenmoe.report.bar_chart import Bar, bar_chart, bars_height
from evenmoe.report.blocks import Column, figure, lines_legend, patches_legend, section, table
from evenmoe.report.content import Content
from evenmoe.report.line_chart import Line, line_chart
from evenmoe.report.markup import Markup, data, element, name, shortened
from evenmoe.report.palette import style
from evenmoe.report.quantities import BYTES, TIMES, common_unit, significant
from evenmoe.report.sections.balance import averaged, buckets

SAVED_HEIGHT = 240  # px


def cost(content: Content) -> Markup:
    """Time per step, time saved so far, and a table of all costs."""
    figures = [_time(content)]
    if len(content.summaries) > 1:
        figures.append(_saved(content))
    body = element("div", *figures, class_="grid")
    return section("cost", "Time, copies and memory", body, _numbers(content))


def _time(content: Content) -> Markup:
    summaries = content.summaries
    unit = common_unit([summary.time for summary in summaries], TIMES)
    longest = max(summary.time for summary in summaries) or 1.0
    bars = []
    for i, summary in enumerate(summaries):
        value = f"{significant(summary.time / unit.size)} {unit.name}"
        shares = (summary.step_time / longest, summary.copy_time / longest)
        bars.append(Bar(shortened(summary.name, 24), value, shares, style(i).colour))
    height = bars_height(bars)
    title = "Mean time per step"
    listing = "; ".join(f"{summary.name} {bar.value}" for summary, bar in zip(summaries, bars, strict=True))
    reference = summaries[0].time / longest
    svg = drawing(bar_chart(bars, reference), "time", title, f"{listing}.", height, kind="bars")
    legend = patches_legend([("solid s0", "expert layers and wire"), ("hollow s0", "copying experts")])
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
        ends = np.append(runs.starts[1:], content.num_steps)
        x = np.append(0.0, ends.astype(np.float64))
        lines.append(Line(policy.name, i, style(i), x, np.append(0.0, values[ends - 1]) / unit.size))
    low, high = min(float(line.y.min()) for line in lines), max(float(line.y.max()) for line in lines)
    y = value_axis(low, high, f"time saved so far ({unit.name})", max(high - low, 1e-3))
    title = f"Time saved over {content.before.name}"
    ends = "; ".join(
        f"{policy.name} {significant(line.y[-1])}" for (_, policy), line in zip(others, lines, strict=True)
    )
    svg = drawing(
        line_chart(lines, index_axis(content.num_steps, "step"), y, SAVED_HEIGHT, zero=True),
        "saved", title, f"Running totals over steps. {unit.name} after the last step: {ends}.", SAVED_HEIGHT,
        kind="named",
    )  # fmt: skip
    caption = (
        "Running total of step and copying time less than the baseline's; above zero a policy has paid for all its "
        f"copies so far.{averaged(runs).replace('mean', 'end')}"
    )
    return figure(title, svg, caption, legend=lines_legend([(i, policy.name) for i, policy in others]), wide=True)


def _numbers(content: Content) -> Markup:
    summaries = content.summaries
    time = common_unit([summary.time for summary in summaries], TIMES)
    copying = [float(policy.copy_time.sum()) for policy in content.simulation.policies]
    total = common_unit(copying, TIMES)
    memory = common_unit([summary.memory for summary in summaries], BYTES)
    extra = common_unit([summary.extra_memory for summary in summaries], BYTES)
    columns = [
        Column("Policy"),
        Column("Step and copying", f"{time.name}, mean", "step-time"),
        Column("Copying", f"{total.name}, all steps", "copy-time"),
        Column("Copies", "experts", "copy"),
        Column("Refreshes", "times", "refresh"),
        Column("Copies per refresh", "experts, mean", "copy"),
        Column("Break-even", "steps", "break-even"),
        Column("Memory", f"{memory.name} per rank", "memory"),
        Column("Extra memory", f"{extra.name} per rank", "memory"),
    ]
    rows = []
    for s, copied in zip(summaries, copying, strict=True):
        each = s.copies / s.refreshes if s.refreshes else 0.0
        rows.append(
            (
                name(s.name),
                data(s.time, significant(s.time / time.size)),
                data(copied, significant(copied / total.size)),
                data(s.copies, quantities.count(s.copies)),
                data(s.refreshes, quantities.count(s.refreshes)),
                data(each, significant(each)),
                data(s.break_even, quantities.steps(s.break_even)),
                data(s.memory, significant(s.memory / memory.size)),
                data(s.extra_memory, significant(s.extra_memory / extra.size)),
            )
        )
    return table("Costs by the model in the settings", columns, rows)
