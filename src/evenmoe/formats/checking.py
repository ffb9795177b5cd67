"""`check`: everything that is wrong with a file, also where no placement can be made of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evenmoe.formats.contents import Options, RawMap
from evenmoe.formats.findings import Finding
from evenmoe.formats.reading import check_use, inspect, open_raw
from evenmoe.formats.values import without_empty_windows
from evenmoe.placement import Placement

_MOST_FINDINGS = 10_000


@dataclass(frozen=True)
class Checked:
    """What `check` found.

    Attributes:
        format: name in `FORMATS`.
        findings: at most 10,000, errors and warnings in the file's order.
        summary: sizes by name; of a load without the windows in which nothing was recorded, which are counted too.
        notes: as in `Contents`.
    """

    format: str
    findings: tuple[Finding, ...]
    summary: dict[str, int]
    notes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether there is no error; warnings may be there."""
        return all(finding.severity != "error" for finding in self.findings)


def check(
    source: str | Path,
    *,
    format: str | None = None,
    num_ranks: int | None = None,
    num_experts: int | None = None,
    num_layers: int | None = None,
    num_slots: int | None = None,
    shared_devices: int | None = None,
    layers: str | None = None,
    placement: Placement | None = None,
    placement_layers: tuple[int, ...] | None = None,
    first_layer: int | None = None,
    num_hidden_layers: int | None = None,
) -> Checked:
    """Every finding about a file; the arguments are those of `read`.

    Without `num_ranks`, a file that does not say how slots divide among ranks is not checked for what concerns ranks.

    Raises:
        FileFormatError: not readable as any format, so that nothing can be said about it; or an argument that
            contradicts it, or that it has no use for.

    >>> [finding.text for finding in check('{"physical_to_logical_map": [[0, 2, 0, 2]]}', num_ranks=2).findings]
    ['no slot for expert 1 in layer 0']
    """
    sizes = (num_ranks, num_experts, num_layers, num_slots, shared_devices)
    options = Options(*sizes, placement, placement_layers, first_layer, num_hidden_layers)
    document, entry, raw = open_raw(source, format, options, layers)
    check_use(document, entry, raw, options)
    findings = tuple(islice(inspect(raw, options), _MOST_FINDINGS))
    notes = list(raw.notes)
    if isinstance(raw, RawMap):
        summary = {"num_layers": len(raw.slots) - raw.mtp_layers, "num_slots": len(raw.slots[0])}
        if raw.mtp_layers:
            summary["num_mtp_layers"] = raw.mtp_layers
        if raw.rank_sizes is not None:
            summary["num_ranks"] = len(raw.rank_sizes[0])
        elif num_ranks is not None:
            summary["num_ranks"] = num_ranks
        else:
            notes.append(
                "the file does not say how slots divide among ranks: nothing about ranks was checked (--ranks)"
            )
    else:
        load, empty = without_empty_windows(raw.load)
        windows, rows, experts = load.shape
        summary = {"num_windows": windows, "num_layers": rows, "num_experts": experts, "num_empty_windows": empty}
    return Checked(entry.name, findings, summary, tuple(notes))
