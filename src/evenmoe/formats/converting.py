"""`convert`: a file in one format → a file in another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.formats.contents import Contents, Load, Options, RawLoad, RawMap
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS, check_hidden_layers_matter
from evenmoe.formats.reading import contents_of, open_raw
from evenmoe.formats.writing import write
from evenmoe.placement import Placement
from evenmoe.traces.trace import Trace

#: What placement files say beside the placement, by name in `Contents.metadata`.
_OF_THE_FILE = ("strategy_version", "layer_updates_per_iter")


@dataclass(frozen=True)
class Converted:
    """What `convert` did: `contents` as read, `format` as written, `notes` of both, what was dropped or assumed."""

    contents: Contents
    format: str
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    format: str | None = None,
    layers: str | None = None,
    first_layer: int | None = None,
    options: Options | None = None,
) -> Converted:
    """Read `source` and write `target` in the format `to`; `format`, `layers` and `options` are those of `read`.

    Between two formats without ranks no number of ranks is needed.

    Args:
        first_layer: the model's number of its first MoE layer, for formats that count dense layers; as in `read`.

    Raises:
        FileFormatError, ConstraintError, OSError: as `read` and `write`.
    """
    if to not in FORMATS:
        raise ConstraintError("to", repr(to), "must be a name in FORMATS", f"use one of {', '.join(FORMATS)}")
    options = options or Options()
    if first_layer is not None:
        options = dataclasses.replace(options, first_layer=first_layer)
    document, entry, raw = open_raw(source, format, options, layers)
    if isinstance(raw, RawMap) and raw.rank_sizes is None and not FORMATS[to].stores_ranks:
        options = dataclasses.replace(options, num_ranks=options.num_ranks or 1)  # written nowhere
    # A trace that is written again as a trace is the same recording: what follows the windows in time stays in place.
    again = isinstance(raw, RawLoad) and raw.trace is not None and to == "evenmoe-trace"
    contents = contents_of(document, entry, raw, options, keep_empty_windows=again)
    check_hidden_layers_matter(contents, FORMATS[to], options)
    notes = write(target, _value(contents, to), format=to, layer_ids=contents.layer_ids, metadata=contents.metadata)
    return Converted(contents, to, (*contents.notes, *_assumed(contents, entry, FORMATS[to]), *notes))


def _value(contents: Contents, to: str) -> Placement | Load | Trace:
    if contents.placement is not None and contents.kind == "placement":
        return contents.placement
    assert contents.load is not None
    if contents.trace is None or to == "evenmoe-trace":
        return contents.trace or contents.load
    return dataclasses.replace(contents.trace, load=contents.load)  # so that `write` names what it leaves out


def _assumed(contents: Contents, source: Format, target: Format) -> list[str]:
    """What of a placement's file is left out, or taken for granted because the other numbers or marks its layers."""
    if contents.kind != "placement":
        return []
    notes = [
        f"left out `{name}`: the format has no place for it"
        for name in _OF_THE_FILE
        if name in contents.metadata and name not in (target.kept_metadata or ())
    ]
    if target.optional_layers and contents.layer_ids is None:
        return [*notes, "left the layers counted from 0: the file has no numbers of the model (--first-layer)"]
    marked = source.dense_rows or not source.model_layers or contents.metadata.get(HIDDEN_LAYERS) is not None
    keeps_numbers = target.optional_layers or (target.model_layers and not target.dense_rows)
    if not marked and not keeps_numbers:
        notes.append("took no layer for an MTP layer; --hidden-layers tells them apart")
    return notes
