"""Where the load lies and which experts are replicated, by layer and rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from evenmoe import quantities
from evenmoe.metrics import peak_over_mean
from evenmoe.quantities import significant
from evenmoe.report.charts import EMPTY, heat_map, patches_legend
from evenmoe.report.content import Content
from evenmoe.report.drawing import Axis, Buckets, index_axis
from evenmoe.report.markup import Column, Markup, data, element, figure, join, name, paragraph, section, table
from evenmoe.simulator.policy_result import PolicyResult

LOAD_EDGES = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0)  # between the ramp's nine colors, in means of a layer
MOST_COLUMNS, MOST_ROWS = 400, 150  # cells of a map at most
TABLE_ROWS = 100  # of the table beside a map at most
WORST = 8  # layers in a table of the worst
REPLICA_EDGES = (2, 3, 5, 9)  # replicas at which the color changes
REPLICA_COLORS = (3, 4, 5, 7, 8)  # of the ramp, for 1, 2, 3–4, 5–8 and 9 or more replicas
REPLICA_LABELS = ("1", "2", "3 or 4", "5 to 8", "9 and more")
EXPERTS = 24  # rows of the map of one layer at most
RANKS = 160  # columns of the map of one layer at most: 2 px each on a page 400 px wide


def load(content: Content) -> Markup:
    """Maps of the policies to look at, then the layers that are worst under the baseline."""
    labels = [f"below {LOAD_EDGES[0]:g}"]
    labels += [f"{low:g}\u2013{high:g}" for low, high in pairwise(LOAD_EDGES)]
    labels += [f"{LOAD_EDGES[-1]:g} and more"]
    legend = patches_legend([(f"patch h{i}", text) for i, text in enumerate(labels)])
    chosen = [("load-before", "Before", content.before)]
    if content.compares:
        chosen.append(("load-after", "After", content.after))
    engines = [content.simulation.policies[index] for index in content.focus if index not in (0, content.best)]
    chosen += [("load-engine", "Engines' rules", policy) for policy in engines]
    maps = [_map(content, key, f"{when}: {policy.name}", policy, legend) for key, when, policy in chosen]
    return join(
        section("load", "Where the load lies", element("div", *maps, class_="grid")),
        section("layers", "Worst layers", _worst(content)),
    )


def relative_load(policy: PolicyResult) -> npt.NDArray[np.float64]:
    """(L, G): rows of each rank over the mean rank's of that layer, of judged steps; nan for a layer without load."""
    mean = policy.rank_tokens.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return policy.rank_tokens / np.where(mean > 0, mean, np.nan)


def coarse(values: npt.NDArray[np.float64], rows: Buckets, columns: Buckets) -> npt.NDArray[np.float64]:
    """The highest value of every block of neighboring layers and ranks."""
    return columns.highest(rows.highest(values), axis=1)


def merged(columns: Buckets, things: str, rows: Buckets) -> str:
    """A sentence for a caption: how many neighbors a cell stands for."""
    parts = [f"{runs.width} {name}" for runs, name in ((columns, things), (rows, "layers")) if runs.width > 1]
    return f" A cell shows the highest of {' by '.join(parts)} beside each other." if parts else ""


def node_borders(num_ranks: int, num_nodes: int, at_most: int = 16) -> tuple[float, ...]:
    """Ranks at which a node begins, the first left out; none where there are too many to be told apart."""
    return tuple(num_ranks / num_nodes * node for node in range(1, num_nodes)) if num_nodes <= at_most else ()


def _map(content: Content, key: str, title: str, policy: PolicyResult, legend: str) -> Markup:
    values = relative_load(policy)
    layers, ranks = values.shape
    rows, columns = Buckets.of(layers, MOST_ROWS), Buckets.of(ranks, MOST_COLUMNS)
    blocks = coarse(values, rows, columns)
    levels = np.where(np.isnan(blocks), EMPTY, np.searchsorted(LOAD_EDGES, blocks, side="right"))
    borders = node_borders(ranks, content.simulation.num_nodes)
    peak = peak_over_mean(policy.rank_tokens.astype(np.float64))
    highest, median = quantities.par(float(peak.max())), quantities.par(float(np.median(peak)))
    svg = heat_map(
        levels,
        columns.spread(index_axis(ranks, "rank")),
        rows.spread(index_axis(layers, "layer", at_most=6)),
        key,
        f"Load by layer and rank, {title}",
        f"{layers} layers by {ranks} ranks. The busiest rank carries {highest} times its layer's mean in the worst "
        f"layer and {median} times in the median layer.",
        dividers=borders,
    )
    caption = (
        "Rows that each rank computed in all judged steps together ÷ the mean rank of that layer. "
        f"Highest: {highest}; highest of the median layer: {median}."
    )
    caption += merged(columns, "ranks", rows)
    if borders:
        caption += " Vertical lines: borders of nodes."
    if np.isnan(values).any():
        caption += " Blank: layers without load."
    numbers = _ranks_table(policy, title) if layers <= TABLE_ROWS else ""
    return figure(title, svg, caption, legend=legend, table=numbers)


def _ranks_table(policy: PolicyResult, title: str) -> Markup:
    columns = [
        Column("Layer"),
        Column("Least", "rows"),
        Column("Mean", "rows"),
        Column("Most", "rows"),
        Column("Busiest", "rank"),
        Column("Most ÷ mean", "judged steps"),
    ]
    rows = []
    for layer, loads in enumerate(policy.rank_tokens):
        mean, peak = float(loads.mean()), float(peak_over_mean(loads.astype(np.float64)))
        rows.append(
            (
                str(layer),
                data(int(loads.min()), quantities.count(int(loads.min()))),
                data(mean, significant(mean, 4)),
                data(int(loads.max()), quantities.count(int(loads.max()))),
                str(int(loads.argmax())),
                data(peak, quantities.par(peak)),
            )
        )
    return table(f"Rows per rank, {title}", columns, rows)


def _worst(content: Content) -> Markup:
    """The layers with the highest mean PAR under the baseline."""
    order = np.argsort(-content.layer_par[0], kind="stable")[:WORST].tolist()
    judged = content.simulation.judged
    chosen = [content.before, content.after] if content.compares else [content.before]
    columns = [Column("Layer")]
    for shown in chosen:
        columns += [Column("Mean PAR", shown.name, "mean_par"), Column("Worst PAR", shown.name, "worst_par")]
    columns += [Column("Busiest expert", "id", "expert"), Column("Its share", "% of rows")]
    columns += [Column("Its replicas", chosen[-1].name, "replica")]
    replicas = chosen[-1].final.num_replicas
    rows = []
    for layer in order:
        cells: list[str] = [str(layer)]
        for shown in chosen:
            mean, worst = float(shown.par[judged, layer].mean()), float(shown.par[judged, layer].max())
            cells += [data(mean, quantities.par(mean)), data(worst, quantities.par(worst))]
        loads = content.simulation.load[layer]
        expert, total = int(loads.argmax()), int(loads.sum())
        if total:
            share = 100.0 * int(loads[expert]) / total
            cells += [str(expert), data(share, quantities.share(share))]
            cells += [data(int(replicas[layer, expert]), str(int(replicas[layer, expert])))]
        else:
            cells += [quantities.NOTHING] * 3
        rows.append(tuple(cells))
    return table(f"Layers with the highest mean PAR under {content.before.name}", columns, rows)


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
    rows, columns = Buckets.of(layers, MOST_ROWS), Buckets.of(experts, MOST_COLUMNS)
    levels = np.array(REPLICA_COLORS)[np.searchsorted(REPLICA_EDGES, coarse(counts, rows, columns), side="right")]
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
    legend = patches_legend([(f"patch h{c}", text) for c, text in zip(REPLICA_COLORS, REPLICA_LABELS, strict=True)])
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
    for row, expert in enumerate(shown.tolist()):
        held[row] = placement.held[layer, :, expert]
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
        caption += f" A cell stands for {columns.width} neighboring ranks."
    if borders:
        caption += " Vertical lines: borders of nodes."
    return figure(title, svg, caption, table=_experts_table(content, layer, shown.tolist()))


def _expert_axis(experts: list[int]) -> Axis:
    ticks = tuple(row + 0.5 for row in range(len(experts)))
    return Axis(0.0, float(len(experts)), ticks, "expert", lambda v: str(experts[round(v - 0.5)]))


def _experts_table(content: Content, layer: int, experts: list[int]) -> Markup:
    placement, loads = content.after.final, content.simulation.load[layer]
    total = int(loads.sum())
    rows = []
    for expert in experts:
        share = 100.0 * int(loads[expert]) / total if total else 0.0
        on = np.flatnonzero(placement.held[layer, :, expert]).tolist()
        number = int(placement.num_replicas[layer, expert])
        rows.append(
            (
                str(expert),
                data(share, quantities.share(share)),
                data(number, str(number)),
                ", ".join(map(str, on)),
            )
        )
    columns = [Column("Expert"), Column("Share", "% of rows"), Column("Replicas"), Column("Ranks", text=True)]
    return table(f"Replicated experts of layer {layer}", columns, rows)
