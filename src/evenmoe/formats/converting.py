"""`convert`: a file in one format → a file in another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.formats.contents import Contents, Options, RawMap
from evenmoe.formats.reading import contents_of, open_raw
from evenmoe.formats.writing import write
from evenmoe.placement import Placement


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
        first_layer: the model's number of the first row, for formats that count dense layers; default: as the source
            says.

    Raises:
        FileFormatError, ConstraintError, OSError: as `read` and `write`.
    """
    if to not in FORMATS:
        raise ConstraintError("to", repr(to), "must be a name in FORMATS", f"use one of {', '.join(FORMATS)}")
    options = options or Options()
    document, entry, raw = open_raw(source, format, options, layers)
    if isinstance(raw, RawMap) and raw.rank_sizes is None and not FORMATS[to].stores_ranks:
        options = dataclasses.replace(options, num_ranks=options.num_ranks or 1)  # written nowhere
    contents = contents_of(document, entry, raw, options)
    value = contents.placement if contents.kind == "placement" else contents.load
    assert value is not None
    rows = value.num_layers if isinstance(value, Placement) else value.shape[1]
    numbers = contents.layer_ids if first_layer is None else tuple(range(first_layer, first_layer + rows))
    metadata = contents.metadata
    if first_layer is not None:
        metadata = {key: item for key, item in metadata.items() if key != "num_hidden_layers"}
    notes = write(target, value, format=to, layer_ids=numbers, metadata=metadata)
    return Converted(contents, to, (*contents.notes, *notes))
