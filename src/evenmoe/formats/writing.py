"""`write`: a placement or a load → a file, and `convert`: a file → one of another format.

The old file stays until the new one is complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.formats.contents import Contents, Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.layer_numbers import (
    HIDDEN_LAYERS,
    MOST_LAYERS,
    check_hidden_layers,
    check_hidden_layers_matter,
    for_target,
    note_new_numbers,
    ranges,
)
from evenmoe.formats.reading import contents_of, merged, open_raw
from evenmoe.io import Value
from evenmoe.io.output import whole_file, whole_folder, write_standard_output
from evenmoe.metrics import as_array, check_counts
from evenmoe.placement import Placement
from evenmoe.registry import blaming
from evenmoe.slot_arrays import share_slots, sizes_text
from evenmoe.traces.trace import Trace

#: What placement files say beside the placement, by name in `Contents.metadata`.
_OF_THE_FILE = ("strategy_version", "layer_updates_per_iter")
_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".csv": "csv",
    ".txt": "text",
    ".npy": "npy",
    ".npz": "npz",
    ".pt": "pt",
    ".pth": "pt",
    ".safetensors": "safetensors",
}


def write(
    target: str | Path,
    value: Placement | Trace | npt.ArrayLike,
    *,
    format: str,
    layer_ids: Sequence[int] | None = None,
    metadata: Mapping[str, Value] | None = None,
) -> tuple[str, ...]:
    """Write a placement or a load.

    The new file is completed beside the old one and then takes its name, so a failure leaves the old one as it was.

    Args:
        target: a path, whose suffix chooses among the format's file types; "-" for standard output.
        value: a `Placement`; or tokens, integers or floats (T, L, E) or (L, E); or a `Trace`, of which formats of loads
            other than evenmoe-trace hold the load alone.
        format: name in `FORMATS`.
        layer_ids: the model's own number of every row, dense layers counted, as `Contents.layer_ids`. Formats that
            number the model's layers (`Format.model_layers`) need it, those that count MoE layers leave it out.
            Default: those of a `Trace`.
        metadata: as `Contents.metadata`; what the format does not know is left out.

    Returns:
        One sentence for everything that was left out, summed or rounded.

    Raises:
        ConstraintError: a value of the other kind, or one that the format cannot hold: layers of multi-token prediction
            ("mtp_layers" in `metadata`), rows of dense layers that are not told apart ("has_dense_rows").
        OSError: the target cannot be written; `filename` names it, and what was there has not changed.
    """
    entry = FORMATS.get(format)
    if entry.write is None:
        raise ConstraintError("format", repr(format), "must be one that evenmoe writes", "it is only read: use another")
    trace = None
    if isinstance(value, Trace):
        trace, value = value, value.load
        if layer_ids is None and trace.layer_ids is not None:
            layer_ids = trace.layer_ids.tolist()
        metadata = {**trace.metadata, **(metadata or {})}
    checked = _checked(value, entry)
    options = WriteOptions(_container(target, entry), metadata=dict(metadata or {}), trace=trace)
    if isinstance(checked, Placement) or HIDDEN_LAYERS in (entry.kept_metadata or ()):
        options.num_hidden_layers = check_hidden_layers(options.metadata.get(HIDDEN_LAYERS))
    rows = checked.num_layers if isinstance(checked, Placement) else checked.shape[1]
    options.layer_ids = _checked_layer_ids(layer_ids, rows, entry)
    if isinstance(checked, Placement):
        _check_ranks(checked, entry)
        checked = for_target(checked, entry, options)
    elif trace is not None:
        options.notes.extend(_left_out(trace, entry))
    note_new_numbers(entry, options)
    with blaming("format", entry.name, FORMATS.is_own(entry)):
        content = entry.write(checked, options)
    if not isinstance(content, bytes | dict):
        raise ConstraintError("format", entry.name, "must write bytes, or a folder's files by name", "correct it")
    if isinstance(content, dict):
        _write_folder(target, content)
    elif str(target) == "-":
        write_standard_output(content)
    else:
        with whole_file(target) as file:
            file.write(content)
    return tuple(options.notes)


def save_placement(
    placement: Placement,
    path: str | Path,
    *,
    format: str = "evenmoe-placement",
    layer_ids: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Write a placement; as `write`, with what is written first, as torch.save has it.

    Args:
        placement: what is written.
        path: a file there is replaced once the new one is complete.
        format: one of placements, by its name in `FORMATS`; `evenmoe-placement` is JSON that `evenmoe.read` reads.
        layer_ids: the model's own number of every layer, dense ones counted; formats that number layers need it.

    Returns:
        One sentence for everything that was left out.

    Raises:
        UnsupportedTypeError: something that is no placement, such as the path in its place.
        ConstraintError: no such format, or one of loads, or one that cannot hold this placement.
        OSError: the file cannot be written; `filename` names it, and what was there has not changed.
    """
    if not isinstance(placement, Placement):
        first = isinstance(path, Placement)
        fix = "call save_placement(placement, path), the placement first" if first else "pass a Placement"
        raise UnsupportedTypeError("placement", f"of type {type(placement).__name__}", "must be a Placement", fix)
    return write(path, placement, format=format, layer_ids=layer_ids)


@dataclass(frozen=True)
class Converted:
    """What `convert` did: `contents` as read, `format` as written, `notes` of both, what was dropped or assumed."""

    contents: Contents
    format: str
    notes: tuple[str, ...]


def convert(
    source: str | Path, target: str | Path, to: str, options: ReadOptions | None = None, **fields: object
) -> Converted:
    """Read `source` and write `target` in the format `to`; `options` and `fields` are those of `read`.

    Between two formats without ranks no number of ranks is needed.

    Raises:
        FileFormatError, ConstraintError, OSError: as `read` and `write`.
    """
    goal = FORMATS.get(to)
    options = merged(options, fields)
    document, entry, raw = open_raw(source, options)
    if isinstance(raw, RawPlacement) and raw.rank_sizes is None and not goal.stores_ranks:
        options = dataclasses.replace(options, num_ranks=options.num_ranks or 1)  # written nowhere
    # A trace that is written again as a trace is the same recording: what follows the windows in time stays in place.
    again = isinstance(raw, RawLoad) and raw.trace is not None and goal.whole_traces
    contents = contents_of(document, entry, raw, options, keep_empty_windows=again)
    check_hidden_layers_matter(contents, goal, options)
    value = contents.placement if contents.kind == "placement" else _load(contents, goal)
    assert value is not None
    left = [] if contents.trace is None else _left_out(contents.trace, goal)
    notes = write(target, value, format=to, layer_ids=contents.layer_ids, metadata=contents.metadata)
    return Converted(contents, goal.name, (*contents.notes, *_assumed(contents, entry, goal), *left, *notes))


def _left_out(trace: Trace, entry: Format) -> list[str]:
    """What of a trace has no place in the format, by name."""
    if entry.whole_traces:
        return []
    names = [name for name in ("routing", "seq_start", "load_by_rank") if getattr(trace, name) is not None]
    if entry.kept_metadata is not None:
        names += [name for name in sorted(trace.metadata) if name not in entry.kept_metadata]
    return [f"left out {', '.join(f'`{name}`' for name in names)}: the format has no place for them"] if names else []


def _checked(value: Placement | npt.ArrayLike, entry: Format) -> Placement | Load:
    kind = "placement" if isinstance(value, Placement) else "load"
    if kind != entry.kind:
        raise ConstraintError(
            "format",
            entry.name,
            f"must hold a {kind}, for that is the value, and holds a {entry.kind}",
            f"use one of {', '.join(n for n in FORMATS if (f := FORMATS.get(n)).kind == kind and f.write)}",
        )
    if isinstance(value, Placement):
        return value
    try:
        load = as_array(value)
    except Exception as error:  # what torch and numpy raise for what is no array: five types at least
        raise ConstraintError(
            "value",
            f"a {type(value).__name__} that is no array ({' '.join(str(error).split())[:80]})",
            "must hold numbers, (windows, layers, experts) or (layers, experts), rows of one length",
            "pass tokens per expert, one row per layer",
        ) from None
    if load.ndim == 2:
        load = load[None]
    if load.ndim != 3 or load.size == 0 or load.dtype.kind not in "iuf":
        raise ConstraintError(
            "value",
            f"an array of dtype {load.dtype}, shape {load.shape}",
            "must hold numbers, (windows, layers, experts) or (layers, experts), no axis empty",
            "pass tokens per expert, one row per layer",
        )
    if load.dtype == np.uint64 and load.max() >= 2**63:
        raise ConstraintError("value", f"an array of up to {load.max()}", "must fit int64", "check for an overflow")
    with np.errstate(over="ignore"):  # a longdouble beyond float64 becomes infinite, and is found as such
        load = load.astype(np.float64 if load.dtype.kind == "f" else np.int64)
    check_counts(load, "value", "check the load")
    return load


def _check_ranks(value: Placement, entry: Format) -> None:
    """Raise a ConstraintError where the format cannot say how many slots each rank has."""
    sizes, first = value.rank_sizes, share_slots(value.num_slots, value.num_ranks)
    if value.is_even or entry.uneven_ranks == "any" or (entry.uneven_ranks == "first" and sizes == first):
        return
    rule, fix = "must have the same number of slots on every rank", "give all ranks one number of slots, none 0"
    if entry.uneven_ranks == "first":
        rule, fix = f"{rule}, or one more on each of the first,", f"give the ranks {sizes_text(first)}"
    uneven = f"a placement whose ranks have {sizes_text(sizes)} slots"
    raise ConstraintError("value", uneven, f"{rule} for {entry.name}", f"{fix}, or use evenmoe-placement")


def check_numbers(format: str, contents: Contents) -> None:
    """Raise ConstraintError where the format needs the model's own numbers of a load's layers, which are not known."""
    assert contents.load is not None
    _checked_layer_ids(contents.layer_ids, contents.load.shape[1], FORMATS.get(format))


def _checked_layer_ids(layer_ids: Sequence[int] | None, rows: int, entry: Format) -> tuple[int, ...] | None:
    if layer_ids is None:
        if entry.model_layers:
            raise ConstraintError(
                "layer_ids",
                "not given",
                f"must say the model's own number of each of the {rows} rows: {entry.name} counts dense layers, too",
                "pass layer_ids (--first-layer), for example 3 for DeepSeek-V3, 0 for a model without dense layers",
            )
        return None
    numbers = tuple(int(number) for number in layer_ids)
    if entry.whole_traces:
        return numbers  # a trace has its own rules, and checks them
    if (
        len(numbers) != rows
        or any(b <= a for a, b in pairwise(numbers))
        or numbers[0] < 0
        or numbers[-1] >= MOST_LAYERS
    ):
        raise ConstraintError(
            "layer_ids",
            f"{ranges(numbers)[:60] or 'empty'}, {len(numbers)} numbers for {rows} rows",
            f"must number every row, ascending from 0 to less than {MOST_LAYERS}",
            "pass as many numbers as layers",
        )
    return numbers


def _container(target: str | Path, entry: Format) -> str:
    asked = _BY_SUFFIX.get(Path(target).suffix.lower())
    return asked if asked in entry.containers else entry.containers[0]


def _write_folder(target: str | Path, files: dict[str, bytes]) -> None:
    if str(target) == "-":
        raise ConstraintError("target", "-", "must be a folder for this format", "name a folder")
    path = Path(target)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConstraintError(
            "target", path, "must be a new or an empty folder", "remove it, or name another: nothing is overwritten"
        )
    with whole_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def _load(contents: Contents, goal: Format) -> Load | Trace | None:
    """What is written of a load; a whole trace where the format has a place for it, whose windows are all kept."""
    return contents.trace if contents.trace is not None and goal.whole_traces else contents.load


def _assumed(contents: Contents, source: Format, goal: Format) -> list[str]:
    """What of a placement's file is left out, or taken for granted because the other numbers or marks its layers."""
    if contents.kind != "placement":
        return []
    notes = [
        f"left out `{name}`: the format has no place for it"
        for name in _OF_THE_FILE
        if name in contents.metadata and name not in (goal.kept_metadata or ())
    ]
    if goal.optional_layers and contents.layer_ids is None:
        return [*notes, "left the layers counted from 0: the file has no numbers of the model (--first-layer)"]
    marked = source.dense_rows or not source.model_layers or contents.metadata.get(HIDDEN_LAYERS) is not None
    keeps_numbers = goal.optional_layers or (goal.model_layers and not goal.dense_rows)
    if not marked and not keeps_numbers:
        notes.append("took no layer for an MTP layer; --hidden-layers tells them apart")
    return notes
