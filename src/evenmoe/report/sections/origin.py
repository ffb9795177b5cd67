"""How the page was made: settings, notes, command, inputs; and what its words mean."""

from __future__ import annotations

from evenmoe import __version__
from evenmoe.report.blocks import Column, paragraph, section, table
from evenmoe.report.content import Content
from evenmoe.report.markup import Markup, element, join, name

#: Names under which a replay keeps its command, and the digests of its files, among the settings.
COMMAND, DIGEST = "command", "SHA-256 of "

#: Key, word and definition, in the order shown; tables link to the key.
WORDS = (
    (
        "par",
        "PAR, peak-to-average",
        "The busiest rank's load ÷ the mean rank's load, in one layer and one step. 1 is perfect; at 2 the busiest "
        "rank computes twice the mean, and all others wait for it. “Mean PAR” is the plain mean over all steps and "
        "layers, “worst PAR” the maximum. A layer without load counts as 1; steps before a policy's "
        "first plan count as well. No unit.",
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
        "step-time",
        "Step time",
        "Modelled time of one step: for every layer the busiest rank's experts, and the wire. The cost model's figures "
        "are in the settings; time outside the expert layers is not included.",
    ),
    ("copy-time", "Copying", "Modelled time of moving expert weights before a step, while nothing else goes on."),
    (
        "gain",
        "Gain",
        "100 % minus step time ÷ step time of the first policy, from the means over all steps; above 0 is faster. Net "
        "gain is the same with the time of copying added to both.",
    ),
    (
        "copy",
        "Copy",
        "One expert's weights moved to a rank that did not hold them. The first placement is not counted.",
    ),
    (
        "refresh",
        "Refresh",
        "The placement is replaced before a step. The policy's description says what the new one is planned from.",
    ),
    (
        "break-even",
        "Break-even",
        "Steps after which a mean refresh has paid for its copies, beside the first policy: copying time of a refresh "
        "÷ step time saved per step. “never”: no time is saved; 0: copying takes none.",
    ),
    (
        "memory",
        "Memory",
        "Bytes of expert weights on one rank, all layers. KiB, MiB and GiB are 2¹⁰, 2²⁰ and 2³⁰ bytes. Extra memory is "
        "what a rank holds beyond the first policy.",
    ),
)


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


def glossary() -> Markup:
    """What every measure means, with its unit."""
    items = []
    for key, word, text in WORDS:
        items.append(element("dt", word, id=f"w-{key}"))
        items.append(element("dd", text))
    return section("words", "Words and units", element("dl", *items, class_="words"))
