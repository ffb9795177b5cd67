"""Where the load lies: layer × rank before and after, and the worst layers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import peak_over_mean
from evenmoe.report import quantities
from evenmoe.report.axes import index_axis
from evenmoe.report.blocks import Column, figure, patches_legend, section, table
from evenmoe.report.content import Content
from evenmoe.report.downsample import Buckets
from evenmoe.report.heat_map import EMPTY, heat_map
from evenmoe.report.markup import Markup, data, element, join
from evenmoe.report.quantities import significant
from evenmoe.simulator.result import PolicyResult

EDGES = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0)  # between the ramp's nine colours, in means of a layer
COLUMNS, ROWS = 400, 150  # cells of a map at most
TABLE_ROWS = 100  # of the table beside a map at most
WORST = 8  # layers in a table of the worst


def load(content: Content) -> Markup:
    """Both maps, then the worst layers under the baseline and under the best policy."""
    labels = [f"below {EDGES[0]:g}"]
    labels += [f"{low:g}\u2013{high:g}" for low, high in pairwise(EDGES)]
    labels += [f"{EDGES[-1]:g} and more"]
    legend = patches_legend([(f"patch h{i}", text) for i, text in enumerate(labels)])
    chosen = [("load-before", "Before", content.before)]
    tables = [_worst(content, 0)]
    if content.compares:
        chosen.append(("load-after", "After", content.after))
        tables.append(_worst(content, content.best))
    maps = [_map(content, key, f"{when}: {policy.name}", policy, legend) for key, when, policy in chosen]
    return join(
        section("load", "Where the load lies", element("div", *maps, class_="grid")),
        section("layers", "Worst layers", *tables),
    )


def relative_load(policy: PolicyResult) -> npt.NDArray[np.float64]:
    """(L, G): rows of each rank over the mean rank's of that layer, all steps together; nan in a layer without load."""
    mean = policy.rank_tokens.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return policy.rank_tokens / np.where(mean > 0, mean, np.nan)


def coarse(values: npt.NDArray[np.float64], rows: Buckets, columns: Buckets) -> npt.NDArray[np.float64]:
    """The highest value of every block of neighbouring layers and ranks."""
    return columns.highest(rows.highest(values), axis=1)


def merged(columns: Buckets, things: str, rows: Buckets) -> str:
    """A sentence for a caption: how many neighbours a cell stands for."""
    parts = [f"{runs.width} {name}" for runs, name in ((columns, things), (rows, "layers")) if runs.width > 1]
    return f" A cell shows the highest of {' by '.join(parts)} beside each other." if parts else ""


def node_borders(num_ranks: int, num_nodes: int, at_most: int = 16) -> tuple[float, ...]:
    """Ranks at which a node begins, the first left out; none where there are too many to be told apart."""
    return tuple(num_ranks / num_nodes * node for node in range(1, num_nodes)) if num_nodes <= at_most else ()


def _map(content: Content, key: str, title: str, policy: PolicyResult, legend: str) -> Markup:
    values = relative_load(policy)
    layers, ranks = values.shape
    rows, columns = Buckets.of(layers, ROWS), Buckets.of(ranks, COLUMNS)
    blocks = coarse(values, rows, columns)
    levels = np.where(np.isnan(blocks), EMPTY, np.searchsorted(EDGES, blocks, side="right"))
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
        "Rows that each rank computed in all steps together ÷ the mean rank of that layer. "
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
        Column("Most ÷ mean", "all steps"),
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


def _worst(content: Content, policy: int) -> Markup:
    """The layers with the highest mean PAR under one policy."""
    order = np.argsort(-content.layer_par[policy], kind="stable")[:WORST].tolist()
    chosen = [content.before, content.after] if content.compares else [content.before]
    columns = [Column("Layer")]
    for shown in chosen:
        columns += [Column("Mean PAR", shown.name, "par"), Column("Worst PAR", shown.name, "par")]
    columns += [Column("Busiest expert", "id", "expert"), Column("Its share", "% of rows")]
    columns += [Column("Its replicas", chosen[-1].name, "replica")]
    replicas = chosen[-1].final.num_replicas
    rows = []
    for layer in order:
        cells: list[str] = [str(layer)]
        for shown in chosen:
            mean, worst = float(shown.par[:, layer].mean()), float(shown.par[:, layer].max())
            cells += [data(mean, quantities.par(mean)), data(worst, quantities.par(worst))]
        loads = content.simulation.load[layer]
        expert, total = int(loads.argmax()), int(loads.sum())
        if total:
            share = 100.0 * int(loads[expert]) / total
            cells += [str(expert), data(share, f"{significant(share)}\u00a0%")]
            cells += [data(int(replicas[layer, expert]), str(int(replicas[layer, expert])))]
        else:
            cells += [quantities.NOTHING] * 3
        rows.append(tuple(cells))
    name = content.simulation.policies[policy].name
    return table(f"Layers with the highest mean PAR under {name}", columns, rows)
