"""Which row of a file is which layer of the model: dense layers, MoE layers, and those of multi-token prediction (MTP).

A model with H hidden layers numbers them 0 to H - 1. Some are dense, the first few in most models, and the rest are MoE
layers; its MTP layers, where it has any, are H, H + 1, …. A file numbers its rows in one of three ways:
    MoE layers alone, counted from 0;
    the model's own numbers, MoE layers alone;
    a row for every hidden layer, dense ones too (`Format.dense_rows`), which does not say which are dense.
What a file does not say, `ReadOptions.first_layer` and `ReadOptions.num_hidden_layers` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.formats.contents import Contents, IntArray, Load, Raw, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import to_logical
from evenmoe.placement import Placement, layers_of

#: In `metadata` of a placement: its rows are every hidden layer, and which of them are dense is not known.
DENSE_ROWS = "has_dense_rows"
#: In `metadata`: H, where it is known.
HIDDEN_LAYERS = "num_hidden_layers"
#: In `metadata` of a placement: the slots of its MTP layers (M, P), which are no rows of the placement itself.
MTP_LAYERS = "mtp_layers"

#: A layer's number is smaller: a file with a row for every hidden layer could not be written otherwise.
MOST_LAYERS = 1 << 16


def number_rows(document: Document, entry: Format, raw: Raw, options: ReadOptions) -> Raw:
    """The file as it is, with what `first_layer` and `num_hidden_layers` say about its rows.

    Raises FileFormatError where they contradict it.
    """
    if isinstance(raw, RawPlacement):
        if options.first_layer is not None:
            raw = _from_first(document, entry, raw, options.first_layer)
        if options.num_hidden_layers is not None:
            raw = _mark_mtp(document, raw, options.num_hidden_layers)
    elif options.first_layer is not None:
        _check_first(document, raw.layer_ids, options.first_layer)
        if raw.layer_ids is None:
            raw.layer_ids = _count_from(options.first_layer, raw.load.shape[1])
    if options.num_hidden_layers is not None:
        stated = raw.metadata.get(HIDDEN_LAYERS, options.num_hidden_layers)
        if stated != options.num_hidden_layers:
            raise document.error(
                f"of {stated} hidden layers",
                f"must have the {options.num_hidden_layers} that num_hidden_layers (--hidden-layers) says",
                "leave that out, or correct it",
            )
        raw.metadata[HIDDEN_LAYERS] = options.num_hidden_layers
    return raw


def row_numbers(raw: Raw) -> tuple[int, ...]:
    """A number for every row, MTP layers too: the model's where it is known, otherwise counted from 0."""
    return raw.layer_ids or _count_from(0, len(raw.slots) if isinstance(raw, RawPlacement) else raw.load.shape[1])


def choose_rows(raw: RawPlacement, rows: Sequence[int]) -> RawPlacement:
    """Only these rows of a placement, in ascending order."""
    main = len(raw.slots) - raw.mtp_layers
    numbers = row_numbers(raw)
    remaining = {numbers[row] for row in rows}
    return dataclasses.replace(
        raw,
        slots=[raw.slots[row] for row in rows],
        rank_sizes=raw.rank_sizes and [raw.rank_sizes[row] for row in rows],
        replica_index=raw.replica_index and [raw.replica_index[row] for row in rows],
        layer_ids=raw.layer_ids and tuple(raw.layer_ids[row] for row in rows),
        mtp_layers=sum(row >= main for row in rows),
        # Whoever chooses rows says which are MoE layers.
        metadata={name: value for name, value in raw.metadata.items() if name != DENSE_ROWS},
        findings=[finding for finding in raw.findings if finding.layer is None or finding.layer in remaining],
    )


def apart_from_mtp(placement: Placement, mtp_layers: int) -> tuple[Placement, IntArray]:
    """The placement without its last `mtp_layers` rows, and the slots of those."""
    main = placement.num_layers - mtp_layers
    return layers_of(placement, range(main)), placement.slot_to_expert[main:].astype(np.int64)


def for_target(value: Placement, entry: Format, options: WriteOptions) -> Placement:
    """The placement's MoE layers, for the format; its MTP layers go to `options`.

    Raises ConstraintError where a row would be lost, or become another layer.
    """
    if options.metadata.get(DENSE_ROWS) and not entry.dense_rows:
        raise ConstraintError(
            "first_layer",
            "not given",
            "must say which is the model's first MoE layer: the placement has a row for every hidden layer, dense ones "
            f"too, and {entry.name} has rows for MoE layers alone",
            "pass first_layer (--first-layer), 3 for DeepSeek-V3 and 0 for a model without dense layers, or choose the "
            "MoE layers with layers (--layers)",
        )
    value, slots = _mtp_slots(value, options)
    if len(slots) and not entry.mtp_layers:
        fitting = ", ".join(name for name in FORMATS if FORMATS.get(name).mtp_layers)
        raise ConstraintError(
            "format",
            entry.name,
            "must have a place for the layer of multi-token prediction (MTP) that the placement has",
            f"use one of {fitting}, or leave the MTP layer out with layers (--layers first:end)",
        )
    options.mtp_slots = list(slots)
    return value


def note_new_numbers(entry: Format, options: WriteOptions) -> None:
    """Note layer numbers that the format does not hold, because it counts MoE layers from 0."""
    numbers = options.layer_ids
    if numbers is None or numbers == _count_from(0, len(numbers)) or entry.model_layers or entry.optional_layers:
        return
    options.notes.append(f"numbered layers {ranges(numbers)} from 0: the format counts MoE layers")


def check_hidden_layers_matter(contents: Contents, target: Format, options: ReadOptions) -> None:
    """Raise ConstraintError where `num_hidden_layers` neither tells rows apart nor is written: it would do nothing."""
    given = options.num_hidden_layers
    if given is None:
        return
    if contents.kind == "placement":
        matters = contents.layer_ids is not None or target.model_layers or target.optional_layers
    else:
        matters = target.kept_metadata is None or HIDDEN_LAYERS in target.kept_metadata
    if not matters:
        raise ConstraintError(
            HIDDEN_LAYERS,
            given,
            f"must be left out: this {contents.kind} is read and written to {target.name} without it",
            "leave num_hidden_layers (--hidden-layers) out",
        )


def _mtp_slots(value: Placement, options: WriteOptions) -> tuple[Placement, IntArray]:
    """The placement's MoE layers, and the slots of the MTP layers: those of `metadata`, or its rows behind the last."""
    given = options.metadata.get(MTP_LAYERS, [])
    if any(len(row) != value.num_slots for row in given):
        raise ConstraintError(
            MTP_LAYERS,
            f"{len(given)} layers of {' or '.join(sorted({str(len(row)) for row in given}))} slots",
            f"must have the {value.num_slots} slots of the placement",
            "leave it out of the metadata, or plan the MTP layer for as many slots",
        )
    slots = np.array(given, np.int64).reshape(len(given), value.num_slots)
    hidden = options.num_hidden_layers
    behind = sum(number >= hidden for number in options.layer_ids) if hidden and options.layer_ids else 0
    if not behind:
        return value, slots
    assert options.layer_ids is not None
    if behind == value.num_layers or len(slots):
        raise ConstraintError(
            HIDDEN_LAYERS,
            hidden,
            f"must be larger than the number of the last MoE layer, {options.layer_ids[-1]}",
            "correct num_hidden_layers (--hidden-layers)",
        )
    options.layer_ids = options.layer_ids[:-behind]
    return apart_from_mtp(value, behind)


def mtp_numbers(options: WriteOptions) -> list[int]:
    """The model's number of each of `options.mtp_slots`. Raises ConstraintError where it is not known."""
    if not options.mtp_slots:
        return []
    if options.num_hidden_layers is None:
        raise MissingArgumentError(
            HIDDEN_LAYERS,
            "not given",
            "must say the number of the layer of multi-token prediction (MTP), which follows the hidden layers",
            "pass num_hidden_layers (--hidden-layers), 61 for DeepSeek-V3, or leave the MTP layer out with layers "
            "(--layers first:end)",
        )
    return [options.num_hidden_layers + i for i in range(len(options.mtp_slots))]


def by_placement(document: Document, raw: RawLoad, options: ReadOptions) -> RawLoad:
    """The load converted from the slots of `options.placement` to logical experts, where there is one.

    Raises FileFormatError where the counts cannot be those of its slots.
    """
    placement = options.placement
    if placement is None:
        return raw
    leave_out = "leave placement (--map) out"
    trace = raw.trace
    names_experts = trace is not None and (trace.routing is not None or trace.load_by_rank is not None)
    if names_experts and not raw.ids_may_be_slots:
        raise document.error(
            "a trace with routing or loads by rank, which name experts",
            "must count slots alone to take a placement (--map)",
            leave_out,
        )
    if raw.has_own_map:
        raise document.error("a load that holds the map of its own slots", "must be read by that", leave_out)
    width = raw.load.shape[2]
    if width != placement.num_slots:
        raise document.error(
            f"a load with {width} counts per layer",
            f"must have one for each of the {placement.num_slots} slots of its placement",
            f"pass the placement that was in use when it was recorded, or {leave_out} if it counts logical experts",
        )
    held = _layers_of(document, placement, raw.load.shape[1], raw.layer_ids, options.placement_layers)
    load = to_logical(document, raw.load, held.slot_to_expert.astype(np.int64), held.num_experts)
    if trace is not None:
        routing = None if trace.routing is None else _to_experts(document, trace.routing, held)
        trace = dataclasses.replace(trace, load=load, routing=routing)
    return dataclasses.replace(raw, load=load, placement=held, trace=trace)


def _to_experts(document: Document, slots: np.ndarray, placement: Placement) -> np.ndarray:
    """The experts of chosen slots (tokens, L, K). Raises FileFormatError where a token would have one twice."""
    experts = placement.slot_to_expert[np.arange(placement.num_layers)[:, None], slots]
    ordered = np.sort(experts, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if len(twice):
        token, row, k = twice[0].tolist()
        raise document.error(
            f"with expert {ordered[token, row, k]} twice for token {token} under its placement",
            "must name slots of different experts for a token",
            "pass the placement that was in use when it was recorded, or leave placement (--map) out",
        )
    return experts.astype(np.uint16 if placement.num_experts <= 1 << 16 else np.int32)


def _layers_of(
    document: Document,
    placement: Placement,
    rows: int,
    layer_ids: tuple[int, ...] | None,
    placement_layers: tuple[int, ...] | None,
) -> Placement:
    """The rows of the placement that are the load's layers, found by number where both are numbered."""
    fix = "give the placement that was in use when it was recorded"
    if layer_ids is None or placement_layers is None:
        if rows != placement.num_layers:
            raise document.error(
                f"a load with {rows} layers", f"must have the {placement.num_layers} layers of its placement", fix
            )
        return placement
    absent = sorted(set(layer_ids) - set(placement_layers))
    if absent:
        raise document.error(
            f"a load with layer {absent[0]}",
            f"must have layers of its placement, which are {placement_layers[0]} to {placement_layers[-1]}",
            fix,
        )
    chosen = [placement_layers.index(number) for number in layer_ids]
    return layers_of(placement, chosen)


def ranges(numbers: Sequence[int]) -> str:
    """Text for numbers in ascending order.

    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _from_first(document: Document, entry: Format, raw: RawPlacement, first: int) -> RawPlacement:
    if raw.layer_ids is None:
        raw.layer_ids = _count_from(first, len(raw.slots))
        raw.findings = [
            dataclasses.replace(f, layer=None if f.layer is None else f.layer + first) for f in raw.findings
        ]
        return raw
    if not entry.dense_rows:
        _check_first(document, raw.layer_ids, first)
        return raw
    kept = [row for row, number in enumerate(raw.layer_ids) if number >= first]
    if not kept:
        raise document.error(
            f"of {len(raw.slots)} layers",
            f"must have a row for layer {first}, the first MoE layer",
            "check first_layer (--first-layer)",
        )
    if first:
        raw.notes.append(f"left out layers {ranges(range(first))}, which are dense: the first MoE layer is {first}")
    chosen = choose_rows(raw, kept)
    assert chosen.layer_ids is not None
    trivial = [number for number, slots in zip(chosen.layer_ids, chosen.slots, strict=True) if is_trivial(slots)]
    if 0 < len(trivial) < len(kept):
        raw.notes.append(
            f"took layers {ranges(trivial)} for MoE layers: they have the trivial map, as dense layers do; "
            "--layers chooses others"
        )
    return chosen


def is_trivial(slots: np.ndarray) -> bool:
    """Whether slot i holds expert i mod E."""
    experts = min(int(slots.max(initial=0)), len(slots)) + 1
    return np.array_equal(slots, np.arange(len(slots)) % max(1, experts))


def _mark_mtp(document: Document, raw: RawPlacement, hidden: int) -> RawPlacement:
    if raw.layer_ids is None:
        return raw
    main = raw.layer_ids[: len(raw.layer_ids) - raw.mtp_layers]
    behind = sum(number >= hidden for number in main)
    if behind == len(main) or (behind and raw.mtp_layers):
        raise document.error(
            f"with MoE layers {ranges(main)}",
            f"must have those below {hidden}, the number of hidden layers",
            "check num_hidden_layers (--hidden-layers)",
        )
    return dataclasses.replace(raw, mtp_layers=raw.mtp_layers + behind)


def _check_first(document: Document, layer_ids: tuple[int, ...] | None, first: int) -> None:
    if layer_ids is not None and layer_ids[0] != first:
        raise document.error(
            f"with layer {layer_ids[0]} as its first",
            f"must begin with layer {first}, as first_layer (--first-layer) says",
            "leave that out: the file numbers the model's layers itself",
        )


def _count_from(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def check_hidden_layers(value: object) -> int | None:
    """`value`, if it is a number of hidden layers, or None. Raises ConstraintError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= MOST_LAYERS:
        raise ConstraintError(
            HIDDEN_LAYERS,
            repr(value)[:40],
            f"must be a whole number from 1 to {MOST_LAYERS}",
            "pass the model's number of hidden layers, 61 for DeepSeek-V3",
        )
    return int(value)


def without_dense(document: Document, load: Load) -> RawLoad:
    """The load without layers in which no window has a token; what they were is noted.

    Raises FileFormatError where that leaves nothing.
    """
    seen = (load != 0).any(axis=(0, 2))  # NaN counts as seen, and is found later
    rows = np.flatnonzero(seen).tolist()
    if not rows:
        raise document.error("without a single token", "must hold recorded counts", "record some traffic first")
    raw = RawLoad(load if len(rows) == len(seen) else load[:, rows], tuple(rows))
    raw.metadata["num_hidden_layers"] = len(seen)
    dense = np.flatnonzero(~seen).tolist()
    if dense:
        raw.notes.append(f"left out {len(dense)} layers without a token, taken for dense ones: {ranges(dense)}")
    return raw


def load_with_dense(load: Load, options: WriteOptions) -> Load:
    """(T, every hidden layer, E): rows of zeros where `options.layer_ids` skips."""
    numbers, count = _every(options)
    full = np.zeros((load.shape[0], count, load.shape[2]), load.dtype)
    full[:, numbers] = load
    return full


def slots_with_dense(value: Placement, options: WriteOptions) -> np.ndarray:
    """(every hidden layer, P): slot i → expert i mod E where `options.layer_ids` skips."""
    numbers, count = _every(options)
    full = np.tile(np.arange(value.num_slots, dtype=np.int32) % value.num_experts, (count, 1))
    full[numbers] = value.slot_to_expert
    return full


def _every(options: WriteOptions) -> tuple[list[int], int]:
    assert options.layer_ids is not None  # `write` demands them for formats that number the model's layers
    numbers = list(options.layer_ids)
    count = max(numbers[-1] + 1, options.num_hidden_layers or 0)
    if count > len(numbers):
        options.notes.append(f"filled {count - len(numbers)} layers in as dense: {ranges(_others(numbers, count))}")
    return numbers, count


def _others(numbers: list[int], count: int) -> list[int]:
    return sorted(set(range(count)).difference(numbers))
