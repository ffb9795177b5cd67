"""What is wrong with a file for one engine: that it would not read it, or that replicas would stay idle there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from evenmoe.engines.engine import Engine
from evenmoe.formats.contents import Contents, Finding, ReadOptions
from evenmoe.formats.reading import Checked, read
from evenmoe.rules import RULES
from evenmoe.slot_arrays import sizes_text

_RANK_RULE = "unreachable"  # finding of replicas that Ascend's rule leaves idle
_MOST_IDLE = 1000


def check_for_engine(engine: Engine, source: str | Path, options: ReadOptions, found: Checked) -> Checked:
    """What was found in a file, as far as it matters for an engine, and what matters there alone.

    Args:
        engine: that is to read the file.
        source, options: what `evenmoe.formats.reading.check` was given.
        found: what it returned.

    Returns:
        The same without findings on replicas that another rule leaves idle; with errors where the engine reads another
        format, no file of that name or none at all, has as many slots on every rank, or never chooses a replica.

    >>> from evenmoe.engines import ENGINES
    >>> from evenmoe.formats.reading import check
    >>> text = '{"physical_to_logical_map": [[0, 1, 0, 1]]}'
    >>> found = check_for_engine(ENGINES.get("mindie"), text, ReadOptions(), check(text, num_ranks=2))
    >>> [finding.kind for finding in found.findings]
    ['engine-format']
    """
    kept = tuple(finding for finding in found.findings if finding.kind != _RANK_RULE)
    contents = None
    if not any(finding.fatal for finding in kept) and "num_slots" in found.summary and "num_ranks" in found.summary:
        contents = read(source, replace(options, num_ranks=found.summary["num_ranks"]))
    extra = (*_as_file(engine, str(source), found), *(() if contents is None else _as_placement(engine, contents)))
    return replace(found, findings=(*kept, *extra))


def _as_file(engine: Engine, source: str, found: Checked) -> Iterator[Finding]:
    if "num_slots" not in found.summary:
        text, rule = f"a load ({found.format})", f"must be a placement for {engine.name} to read"
        fix = f"plan one from it: evenmoe plan LOAD --for {engine.name} -o FILE"
        yield Finding("error", "engine-format", text, rule, fix)
        return
    if found.format != engine.format:
        rule, fix = f"must be {engine.format} for {engine.version}", f"evenmoe convert FILE OUT --to {engine.format}"
        yield Finding("error", "engine-format", f"a placement as {found.format}", rule, fix)
    elif engine.suffixes and not source.endswith(engine.suffixes) and _is_file(source):
        rule = f"must end in {' or '.join(engine.suffixes)} for {engine.version}"
        yield Finding("error", "engine-suffix", f"a file named {Path(source).name}", rule, "rename it")
    if not engine.loads_file:
        rule = f"must be read by the engine, and {engine.version} starts from no placement in a file"
        fix = f"let its own balancer plan ({engine.balancer_words}), or use a build that reads {engine.format}"
        yield Finding("error", "engine-file", "a placement in a file", rule, fix)


def _is_file(source: str) -> bool:
    """False also for JSON that is too long for a name."""
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _as_placement(engine: Engine, contents: Contents) -> Iterator[Finding]:
    placement, rule = contents.placement, RULES.get(engine.rule)
    assert placement is not None
    if not placement.is_even:
        if not engine.uneven:
            text, rule_text = (
                sizes_text(placement.rank_sizes),
                f"must have as many slots on every rank for {engine.name}",
            )
            yield Finding("error", "engine-uneven", text, rule_text, "plan for --slots that divide by the ranks")
        return
    reached = rule.reachable(placement.num_replicas, placement.num_ranks)
    if not (reached < placement.num_replicas).any():
        return
    idle = rule.shares(placement) == 0
    for row, slot in np.argwhere(idle)[:_MOST_IDLE].tolist():
        expert = int(placement.slot_to_expert[row, slot])
        layer = row if contents.layer_ids is None else contents.layer_ids[row]
        count, chosen = int(placement.num_replicas[row, expert]), int(reached[row, expert])
        yield Finding(
            "error",
            "engine-idle",
            f"one of {count} replicas of expert {expert} in layer {layer}, slot {slot}, that gets no token",
            f"must be chosen by some rank; of {count} replicas {engine.name}'s ranks choose {chosen}",
            f"plan it anew: evenmoe plan LOAD --for {engine.name} -o FILE",
            layer=layer,
            rank=slot // placement.slots_per_rank,
            slot=slot,
            expert=expert,
        )
