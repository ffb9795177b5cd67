"""The page, and `write_report`, which puts it and its pictures on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path

from evenmoe.io.output import made_folder, whole_files
from evenmoe.quantities import count, counted
from evenmoe.report.balance import balance
from evenmoe.report.content import Content
from evenmoe.report.costs import cost, traffic
from evenmoe.report.drawing import color_rules
from evenmoe.report.headline import glossary, headline, origin
from evenmoe.report.maps import load, replicas
from evenmoe.report.markup import Markup, element, join, name
from evenmoe.simulator.result import Simulation

#: Nothing may be fetched or run; styles stand in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LINKS = (
    ("balance", "Balance"),
    ("load", "Load"),
    ("replicas", "Replicas"),
    ("layers", "Worst layers"),
    ("traffic", "Traffic"),
    ("cost", "Cost"),
    ("settings", "Settings"),
    ("origin", "Origin"),
    ("words", "Words"),
)


def page(content: Content) -> str:
    """The whole document."""
    style = files("evenmoe.report").joinpath("page.css").read_text(encoding="utf-8") + color_rules()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{content.simulation.trace}: balance report of evenmoe"),
        element("style", Markup(style)),
    )
    body = element("body", _header(content), element("main", _sections(content)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _header(content: Content) -> Markup:
    simulation = content.simulation
    tokens = simulation.tokens
    low, high = count(int(tokens.min())), count(int(tokens.max()))
    facts = (
        counted(content.summary.num_layers, "MoE layer"),
        f"{counted(simulation.num_experts, 'expert')}, top-{simulation.top_k}",
        f"{counted(simulation.num_ranks, 'rank')}, {counted(simulation.num_nodes, 'node')}",
        f"{counted(len(tokens), 'step')} of {low if low == high else f'{low} to {high}'} tokens",
    )
    return element(
        "header",
        element("p", "evenmoe · balance report", class_="brand"),
        element("h1", name(simulation.trace)),
        element("ul", *(element("li", fact) for fact in facts), class_="facts"),
        element("nav", *(element("a", text, href=f"#{key}") for key, text in LINKS), aria_label="Sections"),
    )


def _sections(content: Content) -> Markup:
    parts = (headline, balance, load, replicas, traffic, cost, origin)
    return join(*(part(content) for part in parts), glossary(content))


def write_report(
    simulation: Simulation,
    path: str | Path,
    command: str,
    inputs: Mapping[str, str] | None = None,
    png_dir: str | Path | None = None,
) -> list[Path]:
    """Write one self-contained HTML page about a replay and, on request, its pictures as PNGs.

    The same arguments give the same bytes. The page asks for nothing outside itself and runs no script. All files take
    their names once all are complete.

    Args:
        simulation: what was found; its first policy is the baseline.
        path: of the page; a file there is replaced.
        command: the command line that made it, shown as it is.
        inputs: SHA-256 in hexadecimal of every file that was read, by path.
        png_dir: folder for the PNGs, made if it is not there; None for none.

    Returns:
        The files written, the page first.

    Raises:
        OSError: a file cannot be written; `filename` names it, and what was there has not changed.
    """
    content = Content(simulation, command, dict(inputs or {}))
    written = {Path(path): page(content).encode("utf-8", "backslashreplace")}
    with ExitStack() as folder:
        if png_dir is not None:
            from evenmoe.report.pictures import draw_pictures  # imports matplotlib, 0.4 s that the page does not need

            written |= {Path(png_dir, name): picture for name, picture in draw_pictures(content).items()}
            folder.enter_context(made_folder(Path(png_dir)))
        with whole_files() as files:
            for target, data in written.items():
                files.write(target, data)
    return list(written)
