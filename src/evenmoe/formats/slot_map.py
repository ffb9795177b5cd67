"""vLLM's expert map (#14544, .pth) and vllm-ascend's global map: (L, D, E), the expert's slot within the rank, or -1.

#14544 makes the last axis as long as the slots, so columns beyond the experts are -1 on every rank.
"""

from __future__ import annotations

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.arrays_output import array_bytes
from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.values import slots_of
from evenmoe.placement import Placement


def matches(document: Document) -> bool:
    return fits(document.value)


def fits(value: object) -> bool:
    """Whether an array looks like such a map: no load has -1."""
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 3
        and value.dtype.kind == "i"
        and value.size > 0
        and int(value.min()) == -1
    )


def read(document: Document, options: Options) -> RawMap:
    table = document.numbers(document.value, "its tensor", (3,), integers=True)
    layers, ranks, width = table.shape
    if table.min() < -1 or table.max() >= width:
        raise document.refuse(
            f"with slots {table.min()} to {table.max()}", f"must hold -1, or slots 0 to {width - 1}", "write it again"
        )
    held = np.flatnonzero((table >= 0).any(axis=(0, 1)))
    experts = options.num_experts or (int(held[-1]) + 1 if len(held) else 1)
    per_rank = int(table.max()) + 1
    raw = RawMap([], [[per_rank] * ranks] * layers, num_experts=experts)
    if not per_rank:
        raise document.refuse("with -1 alone", "must place every expert", "write it again")
    for layer, rows in enumerate(table):
        slots = np.full((ranks, per_rank), -1, np.int64)
        rank, expert = np.nonzero(rows >= 0)
        slots[rank, rows[rank, expert]] = expert
        raw.slots.append(slots.reshape(-1))
        raw.findings.extend(_conflicts(rows, rank, expert, slots, layer))
    if experts < width:
        raw.notes.append(f"took {experts} experts for all: the last {width - experts} columns are -1 everywhere")
    return raw


def write(value: Placement, options: WriteOptions) -> bytes:
    slots = slots_of(value, options).reshape(value.num_layers, value.num_ranks, value.slots_per_rank)
    table = np.full((value.num_layers, value.num_ranks, value.num_experts), -1, np.int32)
    layer, rank, place = np.indices(slots.shape)
    table[layer, rank, slots] = place
    twins = np.argwhere(table[layer, rank, slots] != place)
    if len(twins):
        layer, rank, place = twins[0].tolist()
        raise ConstraintError(
            "value",
            f"a placement with expert {slots[layer, rank, place]} twice on rank {rank} in layer {layer}",
            "must hold an expert at most once on a rank for slot-map",
            "give one of the slots to another expert, or use another format",
        )
    return array_bytes(table, options.container)


def _conflicts(rows, rank, expert, slots, layer: int) -> list[Finding]:
    found = []
    for r, e in zip(rank.tolist(), expert.tolist(), strict=True):
        slot, kept = int(rows[r, e]), int(slots[r, rows[r, e]])
        if kept != e:
            text = f"experts {e} and {kept} in slot {slot} of rank {r} in layer {layer}"
            found.append(
                Finding(
                    "error",
                    "slot-conflict",
                    text,
                    "must have one expert in a slot",
                    "write it again",
                    layer=layer,
                    rank=r,
                    slot=slot,
                    expert=e,
                    fatal=True,
                )
            )
    return found
