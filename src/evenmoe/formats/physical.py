"""Counts per slot → counts per logical expert."""

from __future__ import annotations

import dataclasses

import numpy as np

from evenmoe.formats.contents import IntArray, Load, Options, RawLoad
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.placement import Placement, layers_of


def by_placement(document: Document, raw: RawLoad, options: Options) -> RawLoad:
    """The load converted from the slots of `options.placement` to logical experts, where there is one.

    Raises FileFormatError where the counts cannot be those of its slots.
    """
    placement = options.placement
    if placement is None:
        return raw
    leave_out = "leave placement (--map) out"
    trace = raw.trace
    if trace is not None and (trace.routing is not None or trace.load_by_rank is not None):
        raise document.refuse(
            "a trace with routing or loads by rank, which name experts",
            "must count slots alone to take a placement (--map)",
            leave_out,
        )
    if raw.has_own_map:
        raise document.refuse("a load that holds the map of its own slots", "must be read by that", leave_out)
    width = raw.load.shape[2]
    if width != placement.num_slots:
        raise document.refuse(
            f"a load with {width} counts per layer",
            f"must have one for each of the {placement.num_slots} slots of its placement",
            f"pass the placement that was in use when it was recorded, or {leave_out} if it counts logical experts",
        )
    held = _layers_of(document, placement, raw.load.shape[1], raw.layer_ids, options.placement_layers)
    load = to_logical(document, raw.load, held.slot_to_expert.astype(np.int64), held.num_experts)
    if trace is not None:
        trace = dataclasses.replace(trace, load=load)
    return dataclasses.replace(raw, load=load, placement=held, trace=trace)


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
            raise document.refuse(
                f"a load with {rows} layers", f"must have the {placement.num_layers} layers of its placement", fix
            )
        return placement
    absent = sorted(set(layer_ids) - set(placement_layers))
    if absent:
        raise document.refuse(
            f"a load with layer {absent[0]}",
            f"must have layers of its placement, which are {placement_layers[0]} to {placement_layers[-1]}",
            fix,
        )
    chosen = [placement_layers.index(number) for number in layer_ids]
    return layers_of(placement, chosen)


def to_logical(document: Document, per_slot: Load, slots: IntArray, num_experts: int | None) -> Load:
    """Sum the slots of each expert.

    Args:
        document: named in errors.
        per_slot: (T, L, P), tokens per slot.
        slots: int64 (L, P), the logical expert of each slot.
        num_experts: E; default: the largest id + 1.

    Returns:
        (T, L, E), dtype of `per_slot`.
    """
    if slots.shape != per_slot.shape[1:]:
        raise document.refuse(
            f"with counts of {per_slot.shape[1]} layers and {per_slot.shape[2]} slots",
            f"must fit its placement's {slots.shape[0]} layers and {slots.shape[1]} slots",
            "give the placement that was in use when it was recorded",
        )
    experts = num_experts or int(slots.max()) + 1
    wrong = np.argwhere((slots < 0) | (slots >= min(experts, slots.shape[1])))
    if len(wrong):
        layer, slot = wrong[0].tolist()
        raise document.refuse(
            f"with expert {slots[layer, slot]} in layer {layer}, slot {slot} of its placement",
            f"must place experts 0 to {min(experts, slots.shape[1]) - 1}",
            "check the placement",
        )
    # Before anything is allocated: a number of experts may be any.
    if per_slot.itemsize * len(per_slot) * per_slot.shape[1] * experts > 9 * per_slot.nbytes + ALLOWANCE_BYTES:
        raise document.refuse(f"read with {experts} experts", "must have a slot for each", "check --experts")
    logical = np.zeros((*per_slot.shape[:2], experts), per_slot.dtype)
    with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and found as such
        for layer, row in enumerate(slots):
            np.add.at(logical[:, layer].T, row, per_slot[:, layer].T)
    return logical
