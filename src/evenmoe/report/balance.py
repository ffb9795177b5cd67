"""PAR over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evenmoe import quantities
from evenmoe.report.charts import Line, line_chart, lines_legend, ticks_below
from evenmoe.report.content import Content
from evenmoe.report.drawing import Buckets, drawing, index_axis, par_axis, style
from evenmoe.report.markup import Column, Markup, data, element, figure, join, name, section, table
from evenmoe.simulator.result import PolicyResult

POINTS = 200  # of a line: on a page 1,200 px wide one every 6 px
ALL_HEIGHT, ONE_HEIGHT = 260, 150  # px
STROKES = 50  # refreshes that are marked one by one at most; more would touch each other on a phone


def balance(content: Content) -> Markup:
    """All policies together, those that are crowded below the baseline once more, then each with its layers' range."""
    policies = list(enumerate(content.simulation.policies))
    if len(policies) == 1:
        alone = _alone(content, 0, content.before, float(content.before.par.max()))
        return section("balance", "Balance over time", alone, _numbers(policies))
    figures = [_together(content, policies, "par", "PAR of every policy over time")]
    medians = [float(np.median(policy.par, axis=1).max()) - 1.0 for _, policy in policies]
    if len(policies) > 2 and medians[0] > 2.0 * max(medians[1:]):
        title = f"The same without {content.before.name}, enlarged"
        figures.append(_together(content, policies[1:], "par-zoom", title))
    tops = [float(policy.par.max()) for _, policy in policies]
    if len(figures) > 1:  # the baseline would press the others flat here too
        tops[1:] = [max(tops[1:])] * (len(tops) - 1)
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
    )


def _together(content: Content, policies: Sequence[tuple[int, PolicyResult]], key: str, title: str) -> Markup:
    lines = [_line(content, index, policy, band=False) for index, policy in policies]
    x, y = index_axis(content.summary.num_steps, "step"), par_axis(max(float(line.y.max()) for line in lines))
    means = ", ".join(
        f"{policy.name} {quantities.par(float(np.median(policy.par, axis=1).mean()))}" for _, policy in policies
    )
    steps = quantities.counted(content.summary.num_steps, "step")
    description = f"Lines over {steps}. Mean over time of the median layer: {means}."
    caption = f"Peak-to-average load of the median layer at every step; lower is better.{averaged(buckets(content))}"
    legend = lines_legend([(index, policy.name) for index, policy in policies])
    numbers = _numbers(policies) if policies[0][0] == 0 else ""  # an enlarged part has no numbers of its own
    svg = drawing(line_chart(lines, x, y, ALL_HEIGHT), key, title, description, ALL_HEIGHT, kind="named")
    return figure(title, svg, caption, legend=legend, table=numbers, wide=True)


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
    body, refreshes = line_chart([line], x, y, ONE_HEIGHT), ""
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
