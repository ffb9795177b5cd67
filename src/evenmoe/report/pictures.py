"""The page's pictures as matplotlib figures, for slides, papers and notebooks; the same input gives the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evenmoe.errors import ConstraintError
from evenmoe.quantities import significant
from evenmoe.report import drawing
from evenmoe.report.content import Content
from evenmoe.report.look import Look
from evenmoe.report.maps import LOAD_EDGES, REPLICA_COLORS, REPLICA_EDGES, REPLICA_LABELS, relative_load
from evenmoe.report.markup import shortened
from evenmoe.simulator.result import Simulation

INK, MUTED, RULE = "#1b2129", "#515b67", "#d5dae1"
DPI = 160
_HEIGHT = 4.6  # inches, of figures that do not grow with their policies
_WIDE = 7.0  # inches, from which on titles and letters have all the room that they want


class Picture(Figure):
    """A matplotlib figure that a notebook shows without any setting."""

    def _repr_png_(self) -> bytes:
        return _bytes(self, "png")


def par(simulation: Simulation, **look: Any) -> Figure:
    """The peak-to-average load of the median layer over the steps; `look` are fields of `Look`, but for the format."""
    return _draw("par", Content(simulation, "", {}), _checked_look(look))


def load(simulation: Simulation, **look: Any) -> Figure:
    """The load of every rank and layer before and after, over the mean rank of the layer; as `par`."""
    return _draw("load", Content(simulation, "", {}), _checked_look(look))


def replicas(simulation: Simulation, **look: Any) -> Figure:
    """The replicas of every expert and layer after the last step; as `par`."""
    return _draw("replicas", Content(simulation, "", {}), _checked_look(look))


def traffic(simulation: Simulation, **look: Any) -> Figure:
    """The token rows that leave their rank in a mean step; as `par`."""
    return _draw("traffic", Content(simulation, "", {}), _checked_look(look))


def time(simulation: Simulation, **look: Any) -> Figure:
    """The modeled time of a mean step; as `par`."""
    return _draw("time", Content(simulation, "", {}), _checked_look(look))


def draw_pictures(content: Content, look: Look) -> dict[str, bytes]:
    """Draw par, load, replicas, traffic and time; the bytes of each by its file's name, such as par.png."""
    return {f"{name}.{look.format}": _bytes(_draw(name, content, look), look.format) for name in _PICTURES}


def _checked_look(look: dict[str, Any]) -> Look:
    for name in look:
        if name not in ("width", "height", "style"):
            raise ConstraintError(
                name, look[name], "must be width, height or style", "use savefig for the file's format"
            )
    return Look(**look)


def _draw(name: str, content: Content, look: Look) -> Figure:
    with rc_context(), warnings.catch_warnings():
        _set_style()
        for size in ("font.size", "axes.titlesize"):  # a figure for one column of a paper is small
            rcParams[size] *= min(1.0, max(look.width / _WIDE, 0.6))
        if look.style is not None:
            _use_style(look.style)
        figure = Picture(figsize=(look.width, look.height or _HEIGHT), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        _PICTURES[name](figure, content)
        if look.height is not None:
            figure.set_figheight(look.height)
        return figure


def _bytes(figure: Figure, format: str) -> bytes:
    buffer = io.BytesIO()
    # What would be other bytes each time: the time of day, and random ids in SVG.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[format]
    with rc_context(), warnings.catch_warnings():
        _set_style()
        rcParams["svg.hashsalt"] = "evenmoe"
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn, which will do
        figure.savefig(buffer, format=format, metadata=metadata, dpi=DPI)
    return buffer.getvalue()


def _use_style(style: str) -> None:
    from matplotlib.style import use

    try:
        use(style)
    except OSError:
        fix = "name one of matplotlib.style.available, or the path of an .mplstyle file"
        raise ConstraintError("style", repr(style), "must be a style that matplotlib finds", fix) from None


def _set_style() -> None:
    """The user's own matplotlibrc must not change the bytes, nor may `$` in a name start a formula."""
    rcdefaults()
    rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": INK,
            "text.parse_math": False,
            "axes.edgecolor": RULE,
            "axes.labelcolor": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "legend.frameon": False,
        }
    )


def _columns(figure: Figure) -> int:
    """Columns of a legend."""
    return max(1, min(3, int(figure.get_figwidth() / 2.8)))


def _labels(content: Content) -> list[str]:
    # A zero-width space in front: matplotlib leaves labels that begin with an underscore out of legends.
    return [f"\u200b{shortened(policy.name, 28)}" for policy in content.simulation.policies]


def _par(figure: Figure, content: Content) -> None:
    axes = figure.subplots()
    steps = np.arange(content.summary.num_steps)
    highest = 1.0
    others = "other policies"
    for i, (policy, label) in enumerate(zip(content.simulation.policies, _labels(content), strict=True)):
        median = np.median(policy.par, axis=1)
        highest = max(highest, float(median.max()))
        if i not in content.focus:  # as on the page: thin and gray behind the others, with one entry for all
            axes.plot(steps, median, label=others, color=MUTED, alpha=0.6, linewidth=0.9, zorder=1, clip_on=False)
            others = "_"
            continue
        look = drawing.style(i)
        axes.plot(
            steps,
            median,
            label=label,
            color=drawing.SERIES_LIGHT[look.color],
            linestyle=(0, tuple(part / 2 for part in look.dash)) if look.dash else "solid",
            linewidth=1.8,
            zorder=2.5,
            clip_on=False,  # half of a line at 1.0 would be cut away
            marker=look.marker.matplotlib,
            markersize=5,
            markevery=(i % 4 * max(1, len(steps) // 40), max(1, len(steps) // 8)) if len(steps) > 8 else None,
        )
    axes.set_ylim(1.0, 1.0 + max(highest - 1.0, 0.05) * 1.06)
    axes.set_xlim(-0.5, max(len(steps) - 0.5, 0.5))
    between = ": " if figure.get_figwidth() >= _WIDE else "\n"
    axes.set_title(f"Peak-to-average load of the median layer{between}{shortened(content.simulation.trace, 50)}")
    axes.set_xlabel("step")
    axes.set_ylabel("PAR (busiest ÷ mean rank; 1 is perfect)")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    figure.legend(ncols=_columns(figure), loc="outside lower left")


def _load(figure: Figure, content: Content) -> None:
    shown = [("Before", content.before), ("After", content.after)][: 2 if content.compares else 1]
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    colors = ListedColormap(drawing.RAMP_LIGHT)
    norm = BoundaryNorm(np.arange(len(drawing.RAMP_LIGHT) + 1) - 0.5, len(drawing.RAMP_LIGHT))
    for axes, (when, policy) in zip(panels, shown, strict=True):
        load = relative_load(policy)
        levels = np.where(np.isnan(load), np.nan, np.searchsorted(LOAD_EDGES, load, side="right"))
        axes.imshow(levels, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
        _map_axes(axes, f"{when}: {shortened(policy.name, 28)}", "rank")
    bar = figure.colorbar(
        ScalarMappable(norm, colors),
        ax=list(panels),
        ticks=np.arange(len(LOAD_EDGES)) + 0.5,
        label="load ÷ mean rank of the layer",
    )
    bar.ax.set_yticklabels([f"{edge:g}" for edge in LOAD_EDGES])


def _replicas(figure: Figure, content: Content) -> None:
    axes = figure.subplots()
    counts = content.after.final.num_replicas
    colors = ListedColormap([drawing.RAMP_LIGHT[color] for color in REPLICA_COLORS])
    levels = np.searchsorted(REPLICA_EDGES, counts, side="right")
    norm = BoundaryNorm(np.arange(len(REPLICA_COLORS) + 1) - 0.5, len(REPLICA_COLORS))
    image = axes.imshow(levels, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    _map_axes(axes, f"Replicas of every expert after the last step: {shortened(content.after.name, 28)}", "expert")
    bar = figure.colorbar(image, ax=axes, ticks=np.arange(len(REPLICA_COLORS)), label="replicas")
    bar.ax.set_yticklabels(REPLICA_LABELS)


def _map_axes(axes: Axes, title: str, across: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(MUTED)


def _traffic(figure: Figure, content: Content) -> None:
    shown = content.summary.shown("rows_within_node")
    within, between = [], []
    for summary in content.summaries:
        within += [summary.rows_within_node, summary.deduplicated_rows_within_node]
        between += [summary.rows_between_nodes, summary.deduplicated_rows_between_nodes]
    labels = [f"{label}, {kind}" for label in _labels(content) for kind in ("per expert", "per rank")]
    axes = _bars(figure, labels, within, between, shown.size, ("within a node", "between nodes"))
    axes.set_title("Rows that leave their rank, mean per step")
    axes.set_xlabel(shown.unit)


def _time(figure: Figure, content: Content) -> None:
    shown = content.summary.shown("net_time_us")
    step = [summary.step_time_us for summary in content.summaries]
    copying = [summary.copy_time_us for summary in content.summaries]
    parts = ("expert layers and exchange", "copying experts")
    axes = _bars(figure, _labels(content), step, copying, shown.size, parts)
    axes.set_title("Mean time per step, by the cost model")
    axes.set_xlabel(shown.unit)


def _bars(
    figure: Figure, labels: list[str], first: list[float], second: list[float], size: float, parts: tuple[str, str]
) -> Axes:
    """Horizontal bars of a filled and an outlined part, with their sums at the end."""
    figure.set_figheight(1.7 + 0.38 * len(labels))
    axes = figure.subplots()
    place = np.arange(len(labels))
    left = np.array(first) / size
    axes.barh(place, left, height=0.62, color=drawing.SERIES_LIGHT[1], label=parts[0])
    axes.barh(
        place, np.array(second) / size, left=left, height=0.62, facecolor=rcParams["axes.facecolor"],
        edgecolor=drawing.SERIES_LIGHT[1], linewidth=1.2, label=parts[1],
    )  # fmt: skip
    for at, (a, b) in enumerate(zip(first, second, strict=True)):
        axes.text((a + b) / size, at, f" {significant((a + b) / size)}", va="center")
    axes.set_yticks(place, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(max(a + b for a, b in zip(first, second, strict=True)) / size, 1e-9) * 1.12)
    axes.tick_params(axis="y", length=0)
    figure.legend(ncols=min(2, _columns(figure)), loc="outside lower left")
    return axes


_PICTURES: dict[str, Callable[[Figure, Content], None]] = {
    "par": _par, "load": _load, "replicas": _replicas, "traffic": _traffic, "time": _time,
}  # fmt: skip
