"""The page from its headline to the glossary, and `write_report`, which puts it and its pictures on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path

from evenmoe import __version__, quantities
from evenmoe.io.output import made_folder, whole_files
from evenmoe.quantities import QUANTITIES, count, counted
from evenmoe.quantities import percent as _percent
from evenmoe.report.charts import swatch
from evenmoe.report.content import Content
from evenmoe.report.drawing import color_rules
from evenmoe.report.look import Look
from evenmoe.report.maps import load, replicas
from evenmoe.report.markup import Column, Markup, data, details, element, join, name, paragraph, section, table
from evenmoe.report.sections import COSTS, TRAFFIC, balance, cost, traffic
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
#: Names under which a replay keeps its command, and the digests of its files, among the settings.
COMMAND, DIGEST = "command", "SHA-256 of "

#: Key, word and definition, in the order shown; those of the figures follow.
WORDS = (
    (
        "par",
        "PAR, peak-to-average load",
        "The busiest rank's load ÷ the mean rank's load, in one layer and one step. 1 is perfect; at 2 the busiest "
        "rank computes twice the mean, and all others wait for it. What vLLM and SGLang call balancedness is 1 ÷ PAR.",
    ),
    ("expert", "Expert", "A logical expert of one layer, numbered from 0. Layers count from 0 in the trace's order."),
    (
        "replica",
        "Slot, replica",
        "A slot is room for one expert's weights on one rank. Slots that hold the same expert are its replicas; the "
        "replica rule says which of them a token goes to.",
    ),
    (
        "row",
        "Row, load",
        "One token's hidden vector on its way to one expert. Load is counted in rows: a token routed to 8 experts is "
        "8 rows. “Per rank” sends one row for each token and destination rank instead.",
    ),
    (
        "unit",
        "Unit",
        "KiB, MiB and GiB are 2¹⁰, 2²⁰ and 2³⁰ bytes. Times are modeled; the cost model's figures are in the settings.",
    ),
)

#: Figures in the table of all policies.
COLUMNS = (
    "net_gain_percent", "gain_percent", "mean_par", "worst_par", "step_time_us", "copy_time_us", "extra_memory_percent",
)  # fmt: skip


def headline(content: Content) -> Markup:
    """The first section."""
    return section("short", "In short", _sentence(content), _cards(content), _policies(content), _descriptions(content))


def _sentence(content: Content) -> Markup:
    said = content.summary.headline
    return join(
        paragraph(said.sentence, class_="lead"),
        *(paragraph(text, class_="also") for text in said.details),
        paragraph(said.measured_on, class_="note"),
    )


def _cards(content: Content) -> Markup:
    best = content.summaries[content.best]
    cards = [
        ("PAR, mean", _was(content, "mean_par", "1 is perfect")),
        ("PAR, worst", _was(content, "worst_par", "of any judged step and layer")),
        ("Time per step", _was(content, "net_time_us", "copying included",
                               f", gain {_percent(best.net_gain_percent)}")),
        ("Experts copied", (data(best.copies, quantities.count(best.copies)),
         f"{counted(best.refreshes, 'refresh', 'refreshes')} in {counted(content.summary.num_steps, 'step')}")),
        ("Break-even", (data(best.break_even_steps, quantities.steps(best.break_even_steps)),
         "steps after each refresh")),
        ("Memory per rank", _was(content, "memory_bytes_per_rank", "expert weights, all layers",
                                 f", {_percent(best.extra_memory_percent)}")),
    ]  # fmt: skip
    items = (element("div", element("dt", a), element("dd", b), element("dd", c, class_="note")) for a, (b, c) in cards)
    heading = join("Figures of ", name(best.name))
    if content.compares:
        heading = join(heading, ", beside ", name(content.before.name))
    return join(paragraph(heading, ".", class_="note"), element("dl", *items, class_="cards"))


def _was(content: Content, key: str, alone: str, more: str = "") -> tuple[Markup, str]:
    """A figure of the best policy, and beside it the baseline's with `more`, or `alone` where it is the best."""
    texts = content.with_unit(key) if QUANTITIES[key].scale else content.summary.shown(key).texts
    value = data(getattr(content.summaries[content.best], key), texts[content.best])
    return value, f"was {texts[0]}{more}" if content.compares else alone


def _policies(content: Content) -> Markup:
    heads = [join(swatch(i), element("span", name(text))) for i, text in content.names]
    return content.table("All policies on the same steps", COLUMNS, heads)


def _descriptions(content: Content) -> Markup:
    """What the policies to look at do; the others on request."""
    parts: dict[bool, list[Markup]] = {True: [], False: []}
    for index, policy in enumerate(content.simulation.policies):
        described = [element("dt", name(policy.name)), element("dd", name(policy.description))]
        parts[index in content.focus] += described
    others = details("What the other policies do", element("dl", *parts[False], class_="policies"))
    notes = content.simulation.notes
    listed = element("ul", *(element("li", note) for note in notes), class_="notes") if notes else ""
    return join(element("dl", *parts[True], class_="policies"), others if parts[False] else "", listed)


def origin(content: Content) -> Markup:
    """Settings, then commands and inputs, the replay's own among them, which it keeps as settings."""
    settings = content.simulation.settings
    commands = [value for key, value, _ in settings if key == COMMAND]
    digests = {key.removeprefix(DIGEST): value for key, value, _ in settings if key.startswith(DIGEST)}
    chosen = [
        (key, element("bdi", value), unit)
        for key, value, unit in settings
        if key != COMMAND and not key.startswith(DIGEST)
    ]
    columns = [Column("Setting"), Column("Value", text=True), Column("Unit", text=True)]
    shown = table("Everything that was chosen", columns, chosen) if chosen else paragraph("None are recorded.")
    if content.command not in commands:
        commands.append(content.command)
    files = [(name(path), element("code", digest)) for path, digest in (digests | content.inputs).items()]
    return join(
        section("settings", "Settings", shown),
        section(
            "origin",
            "How this page was made",
            paragraph(f"By evenmoe {__version__}. The same commands on the same files give the same bytes."),
            *(element("pre", element("code", command), tabindex="0") for command in commands),
            table("Files read", [Column("File"), Column("SHA-256", text=True)], files) if files else "",
        ),
    )


def glossary(content: Content) -> Markup:
    """What every word and every figure in the tables of policies means."""
    words = list(WORDS)
    for key in dict.fromkeys((*COLUMNS, *TRAFFIC, *COSTS)):
        words.append((key, f"{QUANTITIES[key].label}, {content.summary.shown(key).unit}", QUANTITIES[key].definition))
    items = [part for key, word, text in words for part in (element("dt", word, id=f"w-{key}"), element("dd", text))]
    return section("words", "Words and units", element("dl", *items, class_="words"))


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
    figures_dir: str | Path | None = None,
    look: Look | None = None,
) -> list[Path]:
    """Write one self-contained HTML page about a replay and, on request, its pictures as files.

    The same arguments give the same bytes. The page asks for nothing outside itself and runs no script. All files take
    their names once all are complete.

    Args:
        simulation: what was found; its first policy is the baseline.
        path: of the page; a file there is replaced.
        command: the command line that made it, shown as it is.
        inputs: SHA-256 in hexadecimal of every file that was read, by path.
        figures_dir: folder for the pictures, made if it is not there; None for none.
        look: their format, size and style. Default: PNGs.

    Returns:
        The files written, the page first.

    Raises:
        OSError: a file cannot be written; `filename` names it, and what was there has not changed.
    """
    content = Content(simulation, command, dict(inputs or {}))
    written = {Path(path): page(content).encode("utf-8", "backslashreplace")}
    with ExitStack() as folder:
        if figures_dir is not None:
            from evenmoe.report.pictures import draw_pictures  # imports matplotlib, 0.4 s that the page does not need

            pictures = draw_pictures(content, look or Look())
            written |= {Path(figures_dir, name): picture for name, picture in pictures.items()}
            folder.enter_context(made_folder(Path(figures_dir)))
        with whole_files() as files:
            for target, data in written.items():
                files.write(target, data)
    return list(written)
