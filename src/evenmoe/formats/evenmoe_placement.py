"""evenmoe's own placement file: JSON with everything a `Placement` has, and the model's layer numbers.

{"format": "evenmoe-placement", "version": 1, "num_ranks": D, "num_experts": E,
 "layer_ids": [L] or null, "slot_to_expert": [L][P], "replica_index": [L][P]}
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.json_output import json_bytes
from evenmoe.placement import Placement


def matches(document: Document) -> bool:
    return document.says("format", "evenmoe-placement")


def read(document: Document, options: Options) -> RawMap:
    fields = document.fields
    version = document.integer(fields.get("version"), "`version`")
    if version != 1:
        raise document.refuse(f"of version {version}", "must be version 1", "read it with a newer evenmoe")
    slots = document.numbers(fields.get("slot_to_expert"), "`slot_to_expert`", (2,), integers=True)
    order = document.numbers(fields.get("replica_index"), "`replica_index`", (2,), integers=True)
    if order.shape != slots.shape:
        raise document.refuse(
            f"with `replica_index` of shape {order.shape}",
            f"must have that of `slot_to_expert`, {slots.shape}",
            "leave the file as evenmoe wrote it",
        )
    num_ranks = document.integer(fields.get("num_ranks"), "`num_ranks`")
    if num_ranks < 1 or slots.shape[1] % num_ranks:
        raise document.refuse(
            f"with {num_ranks} ranks for {slots.shape[1]} slots", "must have ranks that divide the slots", "correct it"
        )
    layer_ids = fields.get("layer_ids")
    if layer_ids is not None:
        numbers = document.numbers(layer_ids, "`layer_ids`", (1,), integers=True)
        if len(numbers) != len(slots):
            raise document.refuse(
                f"with {len(numbers)} `layer_ids` for {len(slots)} layers", "must number every layer", "correct it"
            )
        layer_ids = tuple(numbers.tolist())
    return RawMap(
        list(slots),
        [[slots.shape[1] // num_ranks] * num_ranks] * len(slots),
        layer_ids,
        replica_index=list(order),
        num_experts=_experts(document, slots),
    )


def _experts(document: Document, slots: np.ndarray) -> int:
    experts = document.integer(document.fields.get("num_experts"), "`num_experts`")
    if not 1 <= experts <= slots.shape[1]:
        raise document.refuse(
            f"with {experts} experts for {slots.shape[1]} slots", "must have a slot for every expert", "correct it"
        )
    return experts


def write(value: Placement, options: WriteOptions) -> bytes:
    return json_bytes(
        {
            "format": "evenmoe-placement",
            "version": 1,
            "num_ranks": value.num_ranks,
            "num_experts": value.num_experts,
            "layer_ids": options.layer_ids,
            "slot_to_expert": value.slot_to_expert,
            "replica_index": value.replica_index,
        }
    )
