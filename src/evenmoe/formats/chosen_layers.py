"""`ReadOptions.layers`: a file's rows by the file's own numbers."""

from __future__ import annotations

import dataclasses

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import Raw, RawPlacement
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import choose_rows, row_numbers
from evenmoe.placement import layers_of


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
        raise document.error(
            f"of layers {numbers[0]} to {numbers[-1]}", f"must have a layer in {layers}", "check --layers"
        )
    if len(kept) < len(numbers):
        raw.notes.append(f"kept {len(kept)} of {len(numbers)} layers, {numbers[kept[0]]} to {numbers[kept[-1]]}")
    if isinstance(raw, RawPlacement):
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
