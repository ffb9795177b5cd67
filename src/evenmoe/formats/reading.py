"""`read`: any file → `Contents`; and `open_raw`, the part of it that also `check` needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.formats.contents import Contents, Options, Raw, RawLoad, RawMap
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding, inspect_load, inspect_map
from evenmoe.formats.layer_numbers import (
    MTP_LAYERS,
    apart_from_mtp,
    check_hidden_layers,
    choose_rows,
    number_rows,
    row_numbers,
)
from evenmoe.formats.physical import by_placement
from evenmoe.formats.source import open_document
from evenmoe.formats.values import without_empty_windows
from evenmoe.io import DamagedFileError
from evenmoe.placement import Placement, layers_of

_FLAGS = {
    "num_ranks": "--ranks",
    "num_experts": "--experts",
    "num_layers": "--num-layers",
    "num_slots": "--slots",
    "shared_devices": "--shared-devices",
    "placement": "--map",
}


def read(
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
) -> Contents:
    """Read a placement or a load.

    Windows of a load in which nothing at all was recorded are left out, such as the unused positions of a ring buffer;
    `Contents.empty_windows` counts them.

    Args:
        source: a path; a folder with a file of every rank (TensorRT-LLM statistics, MindIE CSV, SGLang's dumps); "-"
            for standard input; JSON text that begins with "{"; or "trivial", slot i → expert i mod E, which needs all
            four sizes.
        format: name in `FORMATS`; None to tell by content.
        num_ranks: ranks that share the slots, where the file does not say (`Format.stores_ranks`).
        num_experts: logical experts; default: the largest id + 1. Needed where the last experts may be missing.
        num_layers: MoE layers, where a file appends dump after dump or keeps one list for all layers.
        num_slots: slots of "trivial"; default: one per expert.
        shared_devices: devices of an Ascend map that hold only the shared expert; default: told by content.
        layers: "first:end", "first:end:step" or a number: only these layers, in the file's numbering, `end` left out.
        placement: the one in use when a load per slot was recorded, where the file does not hold it. The counts of an
            expert's slots are added up.
        placement_layers: the model's own number of every row of `placement`, as `Contents.layer_ids` has them. Without,
            its rows are the load's layers in order.
        first_layer: the model's number of its first MoE layer. It numbers the rows of a file that counts MoE layers
            from 0, and of a file with a row for every hidden layer it leaves out those before it, which are dense. All
            later rows are taken for MoE layers; `layers` chooses them where some are dense.
        num_hidden_layers: the model's hidden layers, dense ones counted, 61 for DeepSeek-V3. Layers that a file numbers
            from there on are layers of multi-token prediction (MTP): they go to `Contents.metadata`.

    Raises:
        FileFormatError: not readable, damaged, of no known format or of several, or no placement or load can be made of
            it. `check` lists everything that is wrong. Or an argument that contradicts the file, or that it has no use
            for: `placement` with counts of experts, numbers of ranks or slots with a load.
        ConstraintError: an argument that no file fits.

    >>> contents = read('{"physical_to_logical_map": [[0, 1, 0, 2]]}', num_ranks=2)
    >>> contents.format, contents.placement.num_replicas.tolist()
    ('sglang-location', [[2, 1, 1]])
    """
    options = Options(
        num_ranks,
        num_experts,
        num_layers,
        num_slots,
        shared_devices,
        placement,
        placement_layers,
        first_layer=first_layer,
        num_hidden_layers=num_hidden_layers,
    )
    return contents_of(*open_raw(source, format, options, layers), options)


def contents_of(
    document: Document, entry: Format, raw: Raw, options: Options, *, keep_empty_windows: bool = False
) -> Contents:
    """What `read` returns, of a load with `keep_empty_windows` also the windows in which nothing was recorded.

    Raises FileFormatError on the first finding that leaves no placement or load.
    """
    check_use(document, entry, raw, options)
    for finding in inspect(raw, options):
        if finding.fatal:
            raise document.refuse(
                f"with {finding.text}", finding.rule, f"{finding.fix} (evenmoe check lists all findings)"
            )
    notes = (*raw.notes, *(f"{finding.text}: it {finding.rule}" for finding in raw.findings))
    if isinstance(raw, RawMap):
        return _placement_contents(document, entry, raw, options, notes)
    load, empty = (raw.load, 0) if keep_empty_windows else without_empty_windows(raw.load)
    if empty:
        notes = (*notes, f"left out {empty} of {len(raw.load)} windows, in which nothing was recorded")
    return Contents("load", entry.name, raw.placement, load, raw.layer_ids, raw.metadata, notes, empty, raw.trace)


def read_placement(
    source: str | Path,
    options: Options,
    layers: str | None = None,
    *,
    format: str | None = None,
    argument: str | None = None,
    ranks_matter: bool = True,
) -> Contents:
    """As `read`, of what must be a placement; errors call it `argument`, where it is that of an option.

    Without `ranks_matter` a file that does not say how slots divide among ranks is read as one rank's.

    Raises:
        ConstraintError: it is a load.
    """
    document, entry = open_format(source, format, options)
    if entry.kind != "placement":
        name, value = (str(source), "a load") if argument is None else (argument, f"{source}, a load")
        raise ConstraintError(name, value, "must be a placement", "plan one from it, or name the file of the placement")
    raw = read_raw(document, entry, options, layers)
    assert isinstance(raw, RawMap)
    if not ranks_matter and raw.rank_sizes is None:
        options = dataclasses.replace(options, num_ranks=options.num_ranks or 1)
    return contents_of(document, entry, raw, options)


def _placement_contents(
    document: Document, entry: Format, raw: RawMap, options: Options, notes: tuple[str, ...]
) -> Contents:
    whole = _placement(document, entry, raw, options)
    if not raw.mtp_layers:
        return Contents("placement", entry.name, whole, None, raw.layer_ids, raw.metadata, notes)
    main = len(raw.slots) - raw.mtp_layers
    if not main:
        raise document.refuse(
            "of a layer of multi-token prediction (MTP) alone", "must hold a MoE layer, too", "check --layers"
        )
    placement, slots = apart_from_mtp(whole, raw.mtp_layers)
    noun = "the MTP layer" if raw.mtp_layers == 1 else f"{raw.mtp_layers} MTP layers"
    return Contents(
        "placement",
        entry.name,
        placement,
        None,
        raw.layer_ids and raw.layer_ids[:main],
        {**raw.metadata, MTP_LAYERS: slots.tolist()},
        (*notes, f"kept {noun} apart from the MoE layers"),
    )


def open_raw(
    source: str | Path, format: str | None, options: Options, layers: str | None = None
) -> tuple[Document, Format, Raw]:
    """The file as it is, its format, and what it holds before it is judged."""
    document, entry = open_format(source, format, options)
    return document, entry, read_raw(document, entry, options, layers)


def open_format(source: str | Path, format: str | None, options: Options) -> tuple[Document, Format]:
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
        return document, _named(document, format) if format else _detect(document)
    except DamagedFileError as error:
        raise _damaged(document, error) from None


def read_raw(document: Document, entry: Format, options: Options, layers: str | None) -> Raw:
    """What a file of this format holds before it is judged."""
    try:
        raw = _module(entry).read(document, options)
    except DamagedFileError as error:  # an .npz unpacks when it is asked for an array
        raise _damaged(document, error) from None
    # The file's own numbers choose its layers, also where it merely counts them and is given the model's.
    shift = options.first_layer or 0 if raw.layer_ids is None else 0
    raw = number_rows(document, entry, raw, options)
    if isinstance(raw, RawLoad):
        raw = _check_sizes(document, by_placement(document, raw, options), options)
    return select_layers(document, raw, layers, shift) if layers else raw


def _damaged(document: Document, error: DamagedFileError) -> FileFormatError:
    return document.refuse(error, "must be an intact .npz file", "write or download it again")


def inspect(raw: Raw, options: Options) -> Iterator[Finding]:
    """Everything that is wrong with it."""
    if isinstance(raw, RawMap):
        return inspect_map(raw, options.num_ranks, options.num_experts)
    return inspect_load(raw)


def check_use(document: Document, entry: Format, raw: Raw, options: Options) -> None:
    """Raise FileFormatError where an option says nothing about a file of this kind, and would silently do nothing."""
    useless = {"placement": options.placement}
    if isinstance(raw, RawLoad):
        useless = {"num_slots": options.num_slots, "shared_devices": options.shared_devices}
        if options.placement is None:  # whose ranks they would be
            useless["num_ranks"] = options.num_ranks
    for name, value in useless.items():
        if value is not None:
            raise document.refuse(
                f"a {entry.kind} ({entry.name})",
                f"takes no {name} ({_FLAGS[name]})",
                "leave that out",
            )


def _check_sizes(document: Document, raw: RawLoad, options: Options) -> RawLoad:
    """The load, if it has the sizes that were given. Raises FileFormatError."""
    for name, found in (("num_layers", raw.load.shape[1]), ("num_experts", raw.load.shape[2])):
        given = getattr(options, name)
        if given is not None and given != found:
            what = name.removeprefix("num_")
            fix = f"leave {name} ({_FLAGS[name]}) out"
            if name == "num_experts" and options.placement is None and given < found:
                fix = f"if it counts slots, pass their placement (--map FILE); else {fix}"
            raise document.refuse(f"a load with {found} {what}", f"must have the {given} that were asked for", fix)
    return raw


def select_layers(document: Document, raw: Raw, layers: str, shift: int) -> Raw:
    """Only the layers "first:end" or "first:end:step" of the file's own numbering, `shift` less than the raw one."""
    parts = layers.split(":")
    try:
        start = int(parts[0]) if parts[0] or len(parts) == 1 else 0
        stop = start + 1 if len(parts) == 1 else int(parts[1]) if parts[1] else 2**62
        step = int(parts[2]) if len(parts) == 3 else 1
        if len(parts) > 3 or step < 1:
            raise ValueError
    except ValueError:
        raise ConstraintError(
            "layers", repr(layers), "must be first:end or a number, or first:end:step", "write 3:61, 3: or 3, or 1:48:2"
        ) from None
    numbers = [number - shift for number in row_numbers(raw)]
    kept = [row for row, number in enumerate(numbers) if number in range(start, stop, step)]
    if not kept:
        raise document.refuse(
            f"of layers {numbers[0]} to {numbers[-1]}", f"must have a layer in {layers}", "check --layers"
        )
    if len(kept) < len(numbers):
        raw.notes.append(f"kept {len(kept)} of {len(numbers)} layers, {numbers[kept[0]]} to {numbers[kept[-1]]}")
    if isinstance(raw, RawMap):
        return choose_rows(raw, kept)
    remaining = {numbers[row] + shift for row in kept}
    return dataclasses.replace(
        raw,
        load=raw.load[:, kept],
        layer_ids=raw.layer_ids and tuple(raw.layer_ids[row] for row in kept),
        placement=None if raw.placement is None else layers_of(raw.placement, kept),
        findings=[finding for finding in raw.findings if finding.layer is None or finding.layer in remaining],
        trace=raw.trace and raw.trace.of_layers(kept),
    )


def _placement(document: Document, entry: Format, raw: RawMap, options: Options) -> Placement:
    num_ranks = options.num_ranks or (len(raw.rank_sizes[0]) if raw.rank_sizes else None)
    if num_ranks is None:
        raise document.refuse(
            f"a {entry.name} file, which says nothing of ranks",
            "must be read with their number",
            "pass num_ranks (--ranks)",
        )
    return Placement(
        np.stack(raw.slots),
        num_ranks,
        num_experts=options.num_experts or raw.num_experts,
        replica_index=None if raw.replica_index is None else np.stack(raw.replica_index),
    )


def _module(entry: Format) -> ModuleType:
    return import_module(entry.module)


def _named(document: Document, format: str) -> Format:
    entry = FORMATS.get(format)
    if entry is None:
        raise ConstraintError("format", repr(format), "must be a name in FORMATS", f"use one of {', '.join(FORMATS)}")
    if document.container not in entry.containers:
        raise document.refuse(
            f"a {document.container} file",
            f"must be {' or '.join(entry.containers)} to be {format}",
            "leave the format out to have it told by content",
        )
    return entry


def _detect(document: Document) -> Format:
    fitting = [
        entry
        for entry in FORMATS.values()
        if entry.reads and document.container in entry.containers and _module(entry).matches(document)
    ]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(entry.name for entry in fitting)
    if fitting:
        raise document.refuse(
            f"a {document.container} file whose content fits {names}",
            "must be of one format",
            "say which with format (--format, --from)",
        )
    raise document.refuse(
        f"a {document.container} file of no known format",
        "must be of a format in FORMATS",
        "see evenmoe convert --list-formats; name it with format (--format, --from) to be told what is missing",
    )
