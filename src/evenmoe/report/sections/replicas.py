"""Which experts are replicated where: layer × expert, and expert × rank in the worst layer."""

from __future__ import annotations

import numpy as np

from evenmoe.report import quantities
from evenmoe.report.axes import Axis, index_axis
from evenmoe.report.blocks import Column, figure, paragraph, patches_legend, section, table
from evenmoe.report.content import Content
from evenmoe.report.downsample import Buckets
from evenmoe.report.heat_map import EMPTY, heat_map
from evenmoe.report.markup import Markup, data, element, name
from evenmoe.report.quantities import significant
from evenmoe.report.sections.load import COLUMNS, ROWS, coarse, merged, node_borders

EDGES = (2, 3, 5, 9)  # replicas at which the colour changes
COLOURS = (3, 4, 5, 7, 8)  # of the ramp, for 1, 2, 3–4, 5–8 and 9 or more replicas
LABELS = ("1", "2", "3 or 4", "5 to 8", "9 and more")
EXPERTS = 24  # rows of the map of one layer at most
RANKS = 160  # columns of the map of one layer at most: 2 px each on a page 400 px wide


def replicas(content: Content) -> Markup:
    """The section, which says so where nothing is replicated."""
    placement = content.after.final
    title = "Replicas"
    if int(placement.num_replicas.max()) == 1:
        text = paragraph("Under ", name(content.after.name), " every expert has one slot: nothing is replicated.")
        return section("replicas", title, text)
    figures = (_by_expert(content), _of_worst_layer(content))
    return section("replicas", title, element("div", *figures, class_="grid"))


def _by_expert(content: Content) -> Markup:
    counts = content.after.final.num_replicas.astype(np.float64)
    layers, experts = counts.shape
    rows, columns = Buckets.of(layers, ROWS), Buckets.of(experts, COLUMNS)
    levels = np.array(COLOURS)[np.searchsorted(EDGES, coarse(counts, rows, columns), side="right")]
    replicated = int((counts > 1).sum())
    title = f"Replicas of every expert: {content.after.name}"
    svg = heat_map(
        levels,
        columns.spread(index_axis(experts, "logical expert")),
        rows.spread(index_axis(layers, "layer", at_most=6)),
        "replicas-all",
        title,
        f"{layers} layers by {experts} experts; {replicated} of {counts.size} have more than one replica, "
        f"the most {int(counts.max())}.",
    )
    caption = (
        f"Slots that hold each expert in the placement of the last step: {quantities.count(replicated)} of "
        f"{quantities.count(counts.size)} experts have more than one, the most has {int(counts.max())}."
    )
    caption += merged(columns, "experts", rows)
    legend = patches_legend([(f"patch h{c}", text) for c, text in zip(COLOURS, LABELS, strict=True)])
    return figure(title, svg, caption, legend=legend)


def _of_worst_layer(content: Content) -> Markup:
    layer, placement = content.worst_layer, content.after.final
    counts, loads = placement.num_replicas[layer], content.simulation.load[layer]
    title = f"Where they are in layer {layer}: {content.after.name}"
    copied = np.flatnonzero(counts > 1)
    if not len(copied):
        return paragraph(f"In layer {layer}, the worst under {content.before.name}, no expert is replicated.")
    shown = copied[np.argsort(-loads[copied], kind="stable")][:EXPERTS]
    held = np.zeros((len(shown), placement.num_ranks), np.float64)
    of_rank = placement.slot_to_expert[layer].reshape(placement.num_ranks, -1)
    for row, expert in enumerate(shown.tolist()):
        held[row] = (of_rank == expert).any(axis=1)
    columns = Buckets.of(placement.num_ranks, RANKS)
    levels = np.where(columns.highest(held, axis=1) > 0, 6, EMPTY)
    borders = node_borders(placement.num_ranks, content.simulation.num_nodes)
    svg = heat_map(
        levels,
        columns.spread(index_axis(placement.num_ranks, "rank")),
        _expert_axis(shown.tolist()),
        "replicas-worst",
        title,
        f"The {len(shown)} busiest of {len(copied)} replicated experts, busiest first, and the ranks that hold them.",
        dividers=borders,
        ruled=True,
    )
    some = f", {len(shown)} of {len(copied)} replicated ones" if len(shown) < len(copied) else ""
    caption = (
        f"Filled: the rank holds the expert. Layer {layer} has the highest mean PAR under {content.before.name}. "
        f"Busiest experts on top{some}."
    )
    if columns.width > 1:
        caption += f" A cell stands for {columns.width} neighbouring ranks."
    if borders:
        caption += " Vertical lines: borders of nodes."
    return figure(title, svg, caption, table=_experts_table(content, layer, shown.tolist()))


def _expert_axis(experts: list[int]) -> Axis:
    ticks = tuple(row + 0.5 for row in range(len(experts)))
    return Axis(0.0, float(len(experts)), ticks, "expert", lambda v: str(experts[round(v - 0.5)]))


def _experts_table(content: Content, layer: int, experts: list[int]) -> Markup:
    placement, loads = content.after.final, content.simulation.load[layer]
    total = int(loads.sum())
    ranks = np.arange(placement.num_slots) // placement.slots_per_rank
    rows = []
    for expert in experts:
        share = 100.0 * int(loads[expert]) / total if total else 0.0
        on = np.unique(ranks[placement.slot_to_expert[layer] == expert]).tolist()
        number = int(placement.num_replicas[layer, expert])
        rows.append(
            (
                str(expert),
                data(share, f"{significant(share)}\u00a0%"),
                data(number, str(number)),
                ", ".join(map(str, on)),
            )
        )
    columns = [Column("Expert"), Column("Share", "% of rows"), Column("Replicas"), Column("Ranks", text=True)]
    return table(f"Replicated experts of layer {layer}", columns, rows)
