"""evenmoe's own placement file: JSON with everything a `Placement` has, and the model's layer numbers.

{"format": "evenmoe-placement", "version": 1, "num_ranks": D, "num_experts": E,
 "layer_ids": [L] or null, "slot_to_expert": [L][P], "replica_index": [L][P]}

"num_hidden_layers": H follows where dense layers or layers of multi-token prediction (MTP) come behind the last of
"layer_ids". Version 2 has "mtp_layers": [M][P] besides, so that no reader of version 1 passes over them.
"""

from __future__ import annotations

import numpy as np

from evenmoe.formats.contents import Options, RawMap, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS, MTP_LAYERS
from evenmoe.io.json_text import json_bytes
from evenmoe.placement import Placement, ascending_replica_index


def matches(document: Document) -> bool:
    return document.says("format", "evenmoe-placement")


def read(document: Document, options: Options) -> RawMap:
    fields = document.fields
    version = document.integer(fields.get("version"), "`version`")
    if version not in (1, 2):
        raise document.refuse(f"of version {version}", "must be version 1 or 2", "read it with a newer evenmoe")
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
    raw = RawMap(
        list(slots),
        [[slots.shape[1] // num_ranks] * num_ranks] * len(slots),
        layer_ids,
        replica_index=list(order),
        num_experts=_experts(document, slots),
    )
    if HIDDEN_LAYERS in fields:
        raw.metadata[HIDDEN_LAYERS] = document.integer(fields[HIDDEN_LAYERS], f"`{HIDDEN_LAYERS}`")
    if version == 2 or MTP_LAYERS in fields:
        _add_mtp(document, raw)
    return raw


def _add_mtp(document: Document, raw: RawMap) -> None:
    mtp = document.numbers(document.fields.get(MTP_LAYERS), f"`{MTP_LAYERS}`", (2,), integers=True)
    if mtp.shape[1] != len(raw.slots[0]):
        raise document.refuse(
            f"with `{MTP_LAYERS}` of {mtp.shape[1]} slots",
            f"must have the {len(raw.slots[0])} of the others",
            "correct it",
        )
    assert raw.rank_sizes is not None
    assert raw.replica_index is not None
    raw.mtp_layers = len(mtp)
    raw.slots += list(mtp)
    raw.rank_sizes = raw.rank_sizes[:1] * len(raw.slots)
    raw.replica_index += list(ascending_replica_index(mtp))
    if raw.layer_ids is not None:
        first = raw.metadata.get(HIDDEN_LAYERS, raw.layer_ids[-1] + 1)
        raw.layer_ids += tuple(range(first, first + len(mtp)))


def _experts(document: Document, slots: np.ndarray) -> int:
    experts = document.integer(document.fields.get("num_experts"), "`num_experts`")
    if not 1 <= experts <= slots.shape[1]:
        raise document.refuse(
            f"with {experts} experts for {slots.shape[1]} slots", "must have a slot for every expert", "correct it"
        )
    return experts


def write(value: Placement, options: WriteOptions) -> bytes:
    content = {
        "format": "evenmoe-placement",
        "version": 2 if options.mtp_slots else 1,
        "num_ranks": value.num_ranks,
        "num_experts": value.num_experts,
        "layer_ids": options.layer_ids,
        "slot_to_expert": value.slot_to_expert,
        "replica_index": value.replica_index,
    }
    hidden, last = options.num_hidden_layers, None if options.layer_ids is None else options.layer_ids[-1]
    if hidden is not None and (options.mtp_slots or hidden - 1 != last):
        content[HIDDEN_LAYERS] = hidden
    if options.mtp_slots:
        content[MTP_LAYERS] = np.stack(options.mtp_slots)
    return json_bytes(content)
