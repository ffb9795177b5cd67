"""DLBlas: expert_load_rank<r>.json, {"layer_<n>": counts (E,)}, what one rank's own tokens chose in all passes.

<n> is the model's number of the layer. In a folder of them the ranks are summed.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Load, RawLoad, ReadOptions
from evenmoe.formats.document import (
    Document,
    documents_of,
    files_in,
    missing_ranks,
    one_rank_alone,
    parse_document,
    rank_in_name,
    ranks_summed,
    read_bytes,
)

_KEY = re.compile(r"layer_([0-9]{1,6})")


def _matches(document: Document) -> bool:
    if document.container == "folder":
        files = files_in(document.value, ".json")
        return bool(files) and _matches(parse_document(str(files[0]), read_bytes(files[0])))
    fields = document.fields
    return bool(fields) and all(
        isinstance(key, str) and _KEY.fullmatch(key) and isinstance(row, np.ndarray) and row.ndim == 1
        for key, row in fields.items()
    )


def _read(document: Document, options: ReadOptions) -> RawLoad:
    notes: list[str] = []
    counts: dict[int, Load] = {}
    ranks: dict[int, str] = {}
    files = 0
    for file in documents_of(document, ".json", notes):
        files += 1
        rank = rank_in_name(file.name)
        if rank is not None and rank in ranks:
            raise document.error(
                f"a folder with rank {rank} twice, in {ranks[rank]} and {Path(file.name).name}",
                "must hold each rank once",
                "put every recording into a folder of its own",
            )
        if rank is not None:
            ranks[rank] = Path(file.name).name
        _add(file, counts)
    layers = sorted(counts)
    widths = {len(row) for row in counts.values()}
    if len(widths) > 1:
        raise document.error(
            f"with {min(widths)} experts in one layer and {max(widths)} in another",
            "must have as many in every layer",
            "record again",
        )
    load = np.stack([counts[layer] for layer in layers])[None]
    document.check_total(load, "its counts over all ranks")
    raw = RawLoad(load, tuple(layers), notes=notes)
    if files == 1:
        raw.notes.append(one_rank_alone(next(iter(ranks), None)))
        return raw
    raw.notes.append(ranks_summed(sorted(ranks), "counts"))
    raw.findings.extend(missing_ranks(sorted(ranks)) if ranks else ())
    return raw


def _add(file: Document, counts: dict[int, Load]) -> None:
    """Add one rank's counts."""
    if not file.fields:
        raise file.error(f"a {file.container} file without layers", "must map `layer_<n>` to counts", "record again")
    for key, value in file.fields.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            raise file.error(f"with the key {str(key)[:40]!r}", "must name layers `layer_<n>`", "record again")
        row = file.numbers(value, f"`{key}`", (1,))
        layer = int(match.group(1))
        before = counts.get(layer)
        if before is not None and before.shape != row.shape:
            raise file.error(
                f"with {len(row)} experts in `{key}`", f"must have the {len(before)} of the other ranks", "record again"
            )
        if before is None and 8 * (len(counts) + 1) * len(row) > 1 << 30:
            raise file.error(f"with {len(counts)} layers", "must be smaller", "check how it was written")
        with np.errstate(over="ignore"):
            counts[layer] = row.copy() if before is None else before + row


LOAD = Format(ENTRIES["dlblas-load"], _matches, _read, model_layers=True)
