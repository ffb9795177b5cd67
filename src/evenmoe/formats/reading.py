"""`read` and `check`: any file → `Contents`, or everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.formats.catalogue import ENTRIES, FORMATS, Entry, Format
from evenmoe.formats.chosen_layers import select_layers
from evenmoe.formats.contents import Contents, Finding, Raw, RawLoad, RawPlacement, ReadOptions
from evenmoe.formats.document import Document, open_document
from evenmoe.formats.findings import inspect_load, inspect_placement, shown_experts, without_empty_windows
from evenmoe.formats.layer_numbers import (
    HIDDEN_LAYERS,
    MTP_LAYERS,
    apart_from_mtp,
    by_placement,
    check_hidden_layers,
    number_rows,
)
from evenmoe.io import DamagedFileError
from evenmoe.placement import Placement
from evenmoe.registry import blaming
from evenmoe.slot_arrays import share_slots

_FLAGS = {
    "num_ranks": "--ranks",
    "num_experts": "--experts",
    "num_layers": "--num-layers",
    "num_slots": "--slots",
    "shared_devices": "--shared-devices",
    "placement": "--map",
}
_MOST_FINDINGS = 10_000


def read(source: str | Path, options: ReadOptions | None = None, **fields: object) -> Contents:
    """Read a placement or a load.

    Windows of a load in which nothing at all was recorded are left out, such as the unused positions of a ring buffer;
    `Contents.empty_windows` counts them.

    Args:
        source: a path; a folder with a file of every rank (TensorRT-LLM statistics, MindIE CSV, SGLang's dumps); "-"
            for standard input; JSON text that begins with "{"; or "trivial", slot i → expert i mod E, which needs all
            four sizes.
        options: what the file does not say.
        fields: of `ReadOptions`, in place of those in `options`.

    Raises:
        FileFormatError: not readable, damaged, of no known format or of several, or no placement or load can be made of
            it. `check` lists everything that is wrong. Or an option that contradicts the file, or that it has no use
            for: `placement` with counts of experts, numbers of ranks or slots with a load.
        ConstraintError: an option that no file fits.

    >>> contents = read('{"physical_to_logical_map": [[0, 1, 0, 2]]}', num_ranks=2)
    >>> contents.format, contents.placement.num_replicas.tolist()
    ('sglang-location', [[2, 1, 1]])
    """
    options = merged(options, fields)
    return contents_of(*open_raw(source, options), options)


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


def check(source: str | Path, options: ReadOptions | None = None, **fields: object) -> Checked:
    """Find everything that is wrong with a file, also where no placement can be made of it; the arguments are `read`'s.

    Without `num_ranks`, a file that does not say how slots divide among ranks is not checked for what concerns ranks.

    Raises:
        FileFormatError: not readable as any format, so that nothing can be said about it; or an option that
            contradicts it, or that it has no use for.

    >>> [finding.text for finding in check('{"physical_to_logical_map": [[0, 2, 0, 2]]}', num_ranks=2).findings]
    ['no slot for expert 1 in layer 0']
    """
    options = merged(options, fields)
    document, format, raw = open_raw(source, options)
    _check_use(document, format, raw, options)
    findings = tuple(islice(_inspect(raw, format, options), _MOST_FINDINGS))
    notes = list(raw.notes)
    if isinstance(raw, RawPlacement):
        summary = {"num_layers": len(raw.slots) - raw.mtp_layers, "num_slots": len(raw.slots[0])}
        if raw.mtp_layers:
            summary["num_mtp_layers"] = raw.mtp_layers
        if raw.rank_sizes is not None:
            summary["num_ranks"] = len(raw.rank_sizes[0])
        elif options.num_ranks is not None:
            summary["num_ranks"] = options.num_ranks
        else:
            notes.append(
                "the file does not say how slots divide among ranks: nothing about ranks was checked (--ranks)"
            )
        summary["num_experts"] = options.num_experts or raw.num_experts or shown_experts(raw)
        if options.num_experts is None and raw.num_experts is None:
            notes.append(
                f"took {summary['num_experts']} experts for all, which the slots show: with more, the last would be "
                "missing (--experts)"
            )
    else:
        load, empty = without_empty_windows(raw.load)
        windows, rows, experts = load.shape
        summary = {"num_windows": windows, "num_layers": rows, "num_experts": experts, "num_empty_windows": empty}
    return Checked(format.name, findings, summary, tuple(notes))


def read_placement(
    source: str | Path,
    options: ReadOptions,
    *,
    argument: str | None = None,
    ranks_matter: bool = True,
    own_ranks: bool = False,
) -> Contents:
    """As `read`, of what must be a placement; errors call it `argument`, where it is that of an option.

    With `own_ranks` the number of ranks is for files that do not say it, and others may have another. Without
    `ranks_matter` a file that does not say how slots divide among ranks is read as one rank's.

    Raises:
        ConstraintError: it is a load.
    """
    document, format, raw = open_placement(source, options, argument)
    if own_ranks and raw.rank_sizes is not None:
        options = dataclasses.replace(options, num_ranks=None)
    if not ranks_matter and raw.rank_sizes is None:
        options = dataclasses.replace(options, num_ranks=options.num_ranks or 1)
    return contents_of(document, format, raw, options)


def open_placement(
    source: str | Path, options: ReadOptions, argument: str | None = None
) -> tuple[Document, Format, RawPlacement]:
    """As `open_raw`, of what must be a placement; errors call it `argument`, where it is that of an option."""
    document, format = _open_format(source, options)
    if format.kind != "placement":
        name, value = (str(source), "a load") if argument is None else (argument, f"{source}, a load")
        raise ConstraintError(name, value, "must be a placement", "plan one from it, or name the file of the placement")
    raw = _read_raw(document, format, options)
    assert isinstance(raw, RawPlacement)
    return document, format, raw


def read_load(source: str | Path, options: ReadOptions) -> Contents:
    """As `read`, of what must be a load.

    Raises:
        ConstraintError: it is a placement.
    """
    document, format = _open_format(source, options)
    if format.kind != "load":
        raise ConstraintError(
            str(source),
            f"a placement ({format.name})",
            "must be a load or a trace",
            "name the recorded load (evenmoe check and diff take placements)",
        )
    return contents_of(document, format, _read_raw(document, format, options), options)


def merged(options: ReadOptions | None, fields: Mapping[str, object]) -> ReadOptions:
    """The options with these fields in place of their own."""
    return dataclasses.replace(options or ReadOptions(), **fields)


def open_raw(source: str | Path, options: ReadOptions) -> tuple[Document, Format, Raw]:
    """The file as it is, its format, and what it holds before it is judged."""
    document, format = _open_format(source, options)
    return document, format, _read_raw(document, format, options)


def contents_of(
    document: Document, format: Format, raw: Raw, options: ReadOptions, *, keep_empty_windows: bool = False
) -> Contents:
    """What `read` returns, of a load with `keep_empty_windows` also the windows in which nothing was recorded.

    Raises FileFormatError on the first finding that leaves no placement or load.
    """
    _check_use(document, format, raw, options)
    for finding in _inspect(raw, format, options):
        if finding.fatal:
            raise document.error(
                f"with {finding.text}", finding.rule, f"{finding.fix} (evenmoe check lists all findings)"
            )
    notes = (*raw.notes, *(f"{finding.text}: it {finding.rule}" for finding in raw.findings))
    if isinstance(raw, RawPlacement):
        return _placement_contents(document, format, raw, options, notes)
    load, empty = (raw.load, 0) if keep_empty_windows else without_empty_windows(raw.load)
    if empty:
        notes = (*notes, f"left out {empty} of {len(raw.load)} windows, in which nothing was recorded")
    return Contents("load", format.name, raw.placement, load, raw.layer_ids, raw.metadata, notes, empty, raw.trace)


def _placement_contents(
    document: Document, format: Format, raw: RawPlacement, options: ReadOptions, notes: tuple[str, ...]
) -> Contents:
    num_ranks = options.num_ranks or (len(raw.rank_sizes[0]) if raw.rank_sizes else None)
    if num_ranks is None:
        raise document.error(
            f"a {format.name} file, which says nothing of ranks",
            "must be read with their number",
            "pass num_ranks (--ranks)",
        )
    whole = Placement(
        np.stack(raw.slots, dtype=np.int32, casting="unsafe"),  # which `inspect_placement` found to fit
        num_ranks,
        num_experts=options.num_experts or raw.num_experts,
        replica_index=None if raw.replica_index is None else np.stack(raw.replica_index),
        rank_sizes=_rank_sizes(raw, num_ranks),
    )
    if not raw.mtp_layers:
        return Contents("placement", format.name, whole, None, raw.layer_ids, raw.metadata, notes)
    main = len(raw.slots) - raw.mtp_layers
    if not main:
        raise document.error(
            "of a layer of multi-token prediction (MTP) alone", "must hold a MoE layer, too", "check --layers"
        )
    placement, slots = apart_from_mtp(whole, raw.mtp_layers)
    noun = "the MTP layer" if raw.mtp_layers == 1 else f"{raw.mtp_layers} MTP layers"
    return Contents(
        "placement",
        format.name,
        placement,
        None,
        raw.layer_ids and raw.layer_ids[:main],
        {**raw.metadata, MTP_LAYERS: slots.tolist()},
        (*notes, f"kept {noun} apart from the MoE layers"),
    )


def _rank_sizes(raw: RawPlacement, num_ranks: int) -> Sequence[int] | None:
    """The slots of each rank; None where all have the same number."""
    if raw.rank_sizes is not None:
        return raw.rank_sizes[0]
    return share_slots(len(raw.slots[0]), num_ranks) if raw.may_be_uneven else None


def _open_format(source: str | Path, options: ReadOptions) -> tuple[Document, Format]:
    """The file as it is, and its format."""
    for name in ("num_ranks", "num_experts", "num_layers", "num_slots"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < 2**31:
            raise ConstraintError(name, value, "must be at least 1 and fit int32", "pass the model's own number")
    check_hidden_layers(options.num_hidden_layers)
    if options.first_layer is not None and not 0 <= options.first_layer < 1 << 16:
        raise ConstraintError(
            "first_layer",
            options.first_layer,
            "must be from 0 to 65535",
            "pass the model's number of its first MoE layer",
        )
    document = open_document(source)
    try:
        return document, _named(document, options.format) if options.format else _detected(document)
    except DamagedFileError as error:
        raise _damaged(document, error) from None


def _named(document: Document, name: str) -> Format:
    format = FORMATS.get(name)
    if format.read is None:
        raise ConstraintError("format", repr(name), "must be one that evenmoe reads", "it is only written: use another")
    if document.container not in format.containers:
        raise document.error(
            f"a {document.container} file",
            f"must be {' or '.join(format.containers)} to be {format.name}",
            "leave the format out to have it detected automatically",
        )
    return format


def _detected(document: Document) -> Format:
    fitting = [format for format in _candidates(document) if format.read is not None and _matches(format, document)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(format.name for format in fitting)
    if fitting:
        raise document.error(
            f"a {document.container} file whose content fits {names}",
            "must be of one format",
            "say which with format (--from)",
        )
    raise document.error(
        f"a {document.container} file of no known format",
        "must be of a format in FORMATS",
        "see evenmoe convert --list-formats; name it with format (--from) to be told what is missing",
    )


def _matches(format: Format, document: Document) -> bool:
    with blaming("format", format.name, FORMATS.is_own(format), DamagedFileError):
        return bool(format.matches(document))


def _candidates(document: Document) -> Iterator[Format]:
    """The formats that are worth a look; modules of others are not imported."""
    for name in FORMATS:
        if name in ENTRIES and not _resembles(document, ENTRIES[name]):
            continue
        format = FORMATS.get(name)
        if document.container in format.containers:
            yield format


def _resembles(document: Document, entry: Entry) -> bool:
    if document.container not in entry.containers:
        return False
    if isinstance(document.value, Mapping):
        return bool(entry.keys) and any(re.fullmatch(entry.keys, str(key)) for key in document.value)
    return entry.arrays or not isinstance(document.value, np.ndarray)


def _read_raw(document: Document, format: Format, options: ReadOptions) -> Raw:
    """What a file of this format holds before it is judged."""
    assert format.read is not None
    try:
        with blaming("format", format.name, FORMATS.is_own(format), DamagedFileError):
            raw = format.read(document, options)
    except DamagedFileError as error:  # an .npz unpacks when it is asked for an array
        raise _damaged(document, error) from None
    if not isinstance(raw, RawLoad | RawPlacement):
        raise ConstraintError("format", format.name, "must read a RawLoad or a RawPlacement", "correct it")
    # The file's own numbers choose its layers, also where it merely counts them and is given the model's.
    shift = options.first_layer or 0 if raw.layer_ids is None else 0
    raw = number_rows(document, format, raw, options)
    if isinstance(raw, RawLoad):
        raw = _check_sizes(document, by_placement(document, raw, options), options)
    return select_layers(document, raw, options.layers, shift) if options.layers else raw


def _damaged(document: Document, error: DamagedFileError) -> FileFormatError:
    return document.error(error, "must be an intact .npz file", "write or download it again")


def _inspect(raw: Raw, format: Format, options: ReadOptions) -> Iterator[Finding]:
    """Everything that is wrong with it."""
    if isinstance(raw, RawPlacement):
        return inspect_placement(raw, options.num_ranks, options.num_experts, rank_rule=format.rank_rule)
    return inspect_load(raw)


def _check_use(document: Document, format: Format, raw: Raw, options: ReadOptions) -> None:
    """Raise FileFormatError where an option says nothing about a file of this kind, and would silently do nothing."""
    useless = {"placement": options.placement}
    if isinstance(raw, RawLoad):
        useless = {"num_slots": options.num_slots, "shared_devices": options.shared_devices}
        if options.placement is None:  # whose ranks they would be
            useless["num_ranks"] = options.num_ranks
    for name, value in useless.items():
        if value is not None:
            rule = f"takes no {name} ({_FLAGS[name]})"
            raise document.error(f"a {format.kind} ({format.name})", rule, "leave that out")


def _check_sizes(document: Document, raw: RawLoad, options: ReadOptions) -> RawLoad:
    """The load, if it has the sizes that were given. Raises FileFormatError."""
    for name, found in (("num_layers", raw.load.shape[1]), ("num_experts", raw.load.shape[2])):
        given = getattr(options, name)
        if name == "num_layers" and given == raw.metadata.get(HIDDEN_LAYERS):
            continue  # dense ones counted
        if given is not None and given != found:
            what = name.removeprefix("num_")
            fix = f"leave {name} ({_FLAGS[name]}) out"
            if name == "num_experts" and options.placement is None and given < found:
                fix = f"if it counts slots, pass their placement (--map FILE); else {fix}"
            raise document.error(f"a load with {found} {what}", f"must have the {given} that were asked for", fix)
    return raw
