"""The numbers that matter, first: one sentence, a few cards, one line per policy."""

from __future__ import annotations

import math

from evenmoe.report import quantities
from evenmoe.report.blocks import Column, paragraph, section, swatch, table
from evenmoe.report.content import Content
from evenmoe.report.markup import Markup, data, element, join, name
from evenmoe.report.quantities import BYTES, TIMES, common_unit, counted, significant
from evenmoe.report.summary import Summary


def headline(content: Content) -> Markup:
    """The first section."""
    return section("short", "In short", _sentence(content), _cards(content), _policies(content), _descriptions(content))


def _sentence(content: Content) -> Markup:
    baseline, best = content.summaries[0], content.summaries[content.best]
    if not content.compares:
        return paragraph(
            "Only ", name(baseline.name), " was replayed, so there is nothing to compare it with. Its busiest rank "
            "carries ", element("strong", f"{quantities.par(baseline.mean_par)} times the mean load"), ".",
            class_="lead",
        )  # fmt: skip
    balance = join(
        element("strong", f"{quantities.par(best.mean_par)} times the mean load"),
        f" instead of {quantities.par(baseline.mean_par)}, for {_more_memory(best)}.",
    )
    if best.net_gain > 0:
        return paragraph(
            "With ", name(best.name), " a step takes ",
            element("strong", f"{_saved(best.net_gain)} less time"), " than with ", name(baseline.name),
            ", copying included: the busiest rank carries ", balance, class_="lead",
        )  # fmt: skip
    return paragraph(
        element("strong", "No policy makes a step faster"), " than ", name(baseline.name), ", copying included. ",
        name(best.name), " comes nearest", _but_for_copying(best), ". Its busiest rank carries ", balance,
        class_="lead",
    )  # fmt: skip


def _saved(gain: float) -> str:
    return quantities.percent(gain).removeprefix("+")


def _but_for_copying(summary: Summary) -> str:
    if not (summary.gain > 0 and math.isfinite(summary.break_even)):
        return ""
    return (
        f": without copying it would save {_saved(summary.gain)}, and a refresh has paid for its copies "
        f"after {significant(summary.break_even)} steps"
    )


def _more_memory(summary: Summary) -> str:
    if summary.extra_memory == 0:
        return "no more memory"
    unit = common_unit([summary.extra_memory], BYTES)
    more = "more" if summary.extra_memory > 0 else "less"
    return f"{significant(abs(summary.extra_memory) / unit.size)} {unit.name} {more} memory on every rank"


def _cards(content: Content) -> Markup:
    baseline, best = content.summaries[0], content.summaries[content.best]
    memory, time = common_unit([best.memory], BYTES), common_unit([baseline.time, best.time], TIMES)
    before = f"was {significant(baseline.time / time.size)} {time.name}"
    cards = [
        ("PAR, mean", data(best.mean_par, quantities.par(best.mean_par)),
         f"was {quantities.par(baseline.mean_par)}" if content.compares else "1 is perfect"),
        ("PAR, worst", data(best.worst_par, quantities.par(best.worst_par)),
         f"was {quantities.par(baseline.worst_par)}" if content.compares else "of any step and layer"),
        ("Time per step", data(best.time, f"{significant(best.time / time.size)} {time.name}"),
         f"{before}, gain {quantities.percent(best.net_gain)}" if content.compares else "copying included"),
        ("Experts copied", data(best.copies, quantities.count(best.copies)),
         f"{counted(best.refreshes, 'refresh', 'refreshes')} in {counted(content.num_steps, 'step')}"),
        ("Break-even", data(best.break_even, quantities.steps(best.break_even)), "steps after each refresh"),
        ("Memory per rank", data(best.memory, f"{significant(best.memory / memory.size)} {memory.name}"),
         f"was {significant(baseline.memory / memory.size)}, {quantities.percent(best.extra_memory_share)}"
         if content.compares else "expert weights, all layers"),
    ]  # fmt: skip
    items = (element("div", element("dt", a), element("dd", b), element("dd", c, class_="note")) for a, b, c in cards)
    heading = join("Figures of ", name(best.name), ", the policy with the least time per step")
    if content.compares:
        heading = join(heading, ", beside ", name(baseline.name))
    return join(paragraph(heading, ".", class_="note"), element("dl", *items, class_="cards"))


def _policies(content: Content) -> Markup:
    summaries = content.summaries
    time = common_unit([summary.step_time for summary in summaries], TIMES)
    columns = [
        Column("Policy"),
        Column("Mean PAR", "max ÷ mean", "par"),
        Column("Worst PAR", "max ÷ mean", "par"),
        Column("Step", f"{time.name}, mean", "step-time"),
        Column("Copying", f"{time.name} per step", "copy-time"),
        Column("Gain", "% of step", "gain"),
        Column("Net gain", "% with copying", "gain"),
        Column("Copies", "experts", "copy"),
        Column("Break-even", "steps", "break-even"),
        Column("Extra memory", "% per rank", "memory"),
    ]
    rows = [
        (
            join(swatch(i), element("span", name(s.name))),
            data(s.mean_par, quantities.par(s.mean_par)),
            data(s.worst_par, quantities.par(s.worst_par)),
            data(s.step_time, significant(s.step_time / time.size)),
            data(s.copy_time, significant(s.copy_time / time.size)),
            data(s.gain, quantities.percent(s.gain)),
            data(s.net_gain, quantities.percent(s.net_gain)),
            data(s.copies, quantities.count(s.copies)),
            data(s.break_even, quantities.steps(s.break_even)),
            data(s.extra_memory_share, quantities.percent(s.extra_memory_share)),
        )
        for i, s in enumerate(summaries)
    ]
    return table("All policies on the same steps", columns, rows)


def _descriptions(content: Content) -> Markup:
    items = []
    for policy in content.simulation.policies:
        items.append(element("dt", name(policy.name)))
        items.append(element("dd", name(policy.description)))
    notes = content.simulation.notes
    listed = element("ul", *(element("li", note) for note in notes), class_="notes") if notes else ""
    return join(element("dl", *items, class_="policies"), listed)
