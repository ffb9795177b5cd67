"""evenmoe's own files: a placement as JSON, and a trace as .npz.

A placement has everything a `Placement` has, and the model's layer numbers:

{"format": "evenmoe-placement", "version": 1, "num_ranks": D, "num_experts": E,
 "layer_ids": [L] or null, "slot_to_expert": [L][P], "replica_index": [L][P]}

"num_hidden_layers": H follows where dense layers or layers of multi-token prediction (MTP) come behind the last of
"layer_ids". Version 2 has "mtp_layers": [M][P] besides, so that no reader of version 1 passes over them. Version 3 has
"rank_sizes": [D], the slots of each rank in slot order, where these are not P / D, and may have "mtp_layers".

What a trace holds `evenmoe.traces.trace` says. An .npz whose `load` holds no counts, but parts of tokens or mistakes,
is read as a load without the rest.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from evenmoe.errors import FileFormatError
from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS, MTP_LAYERS
from evenmoe.formats.values import whole_counts
from evenmoe.io.npz import not_one_text
from evenmoe.io.text import json_bytes
from evenmoe.placement import Placement
from evenmoe.slot_arrays import ascending_replica_index
from evenmoe.traces.trace import checked_trace, parse_metadata, trace_bytes
from evenmoe.traces.trace_arrays import ARRAYS, MOST_TOKENS

_OF_A_LOAD = ("load", "layer_ids")


def _matches_placement(document: Document) -> bool:
    return document.says("format", "evenmoe-placement")


def _read_placement(document: Document, options: ReadOptions) -> RawPlacement:
    fields = document.fields
    version = document.integer(fields.get("version"), "`version`")
    if version not in (1, 2, 3):
        raise document.error(f"of version {version}", "must be version 1, 2 or 3", "read it with a newer evenmoe")
    slots = document.numbers(fields.get("slot_to_expert"), "`slot_to_expert`", (2,), integers=True)
    order = document.numbers(fields.get("replica_index"), "`replica_index`", (2,), integers=True)
    if order.shape != slots.shape:
        raise document.error(
            f"with `replica_index` of shape {order.shape}",
            f"must have that of `slot_to_expert`, {slots.shape}",
            "leave the file as evenmoe wrote it",
        )
    num_ranks = document.integer(fields.get("num_ranks"), "`num_ranks`")
    sizes = _rank_sizes(document, num_ranks, slots.shape[1], uneven=version == 3)
    layer_ids = fields.get("layer_ids")
    if layer_ids is not None:
        numbers = document.numbers(layer_ids, "`layer_ids`", (1,), integers=True)
        if len(numbers) != len(slots):
            raise document.error(
                f"with {len(numbers)} `layer_ids` for {len(slots)} layers", "must number every layer", "correct it"
            )
        layer_ids = tuple(numbers.tolist())
    raw = RawPlacement(
        list(slots),
        [sizes] * len(slots),
        layer_ids,
        replica_index=list(order),
        num_experts=_num_experts(document, slots),
        may_be_uneven=version == 3,
    )
    if HIDDEN_LAYERS in fields:
        raw.metadata[HIDDEN_LAYERS] = document.integer(fields[HIDDEN_LAYERS], f"`{HIDDEN_LAYERS}`")
    if version == 2 or MTP_LAYERS in fields:
        _add_mtp(document, raw)
    return raw


def _rank_sizes(document: Document, num_ranks: int, num_slots: int, *, uneven: bool) -> list[int]:
    if not uneven:
        if num_ranks < 1 or num_slots % num_ranks:
            text = f"with {num_ranks} ranks for {num_slots} slots"
            raise document.error(text, "must have ranks that divide the slots", "correct it")
        return [num_slots // num_ranks] * num_ranks
    sizes = document.numbers(document.fields.get("rank_sizes"), "`rank_sizes`", (1,), integers=True)
    if len(sizes) != num_ranks or sizes.min() < 0 or sizes.max() > num_slots or sizes.sum() != num_slots:
        text = f"with `rank_sizes` of {len(sizes)} ranks, {sizes.sum()} slots"
        raise document.error(
            text, f"must give each of the {num_ranks} ranks 0 slots or more, {num_slots} together", "correct it"
        )
    return sizes.tolist()


def _add_mtp(document: Document, raw: RawPlacement) -> None:
    mtp = document.numbers(document.fields.get(MTP_LAYERS), f"`{MTP_LAYERS}`", (2,), integers=True)
    if mtp.shape[1] != len(raw.slots[0]):
        raise document.error(
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


def _num_experts(document: Document, slots: np.ndarray) -> int:
    experts = document.integer(document.fields.get("num_experts"), "`num_experts`")
    if not 1 <= experts <= slots.shape[1]:
        raise document.error(
            f"with {experts} experts for {slots.shape[1]} slots", "must have a slot for every expert", "correct it"
        )
    return experts


def _write_placement(value: Placement, options: WriteOptions) -> bytes:
    content = {
        "format": "evenmoe-placement",
        "version": (2 if options.mtp_slots else 1) if value.is_even else 3,
        "num_ranks": value.num_ranks,
        **({} if value.is_even else {"rank_sizes": list(value.rank_sizes)}),
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


def _matches_trace(document: Document) -> bool:
    return "load" in document.fields


def _read_trace(document: Document, options: ReadOptions) -> RawLoad:
    fields = document.fields
    load = document.numbers(fields.get("load"), "`load`", (2, 3))
    arrays = {name: fields[name] for name in ARRAYS if name in fields} | {"load": load}
    if not (load == np.rint(load)).all() or not np.isfinite(load).all():
        return _load_alone(document, arrays, "no whole numbers")
    if load.min() < 0:
        return _load_alone(document, arrays, "negative numbers")
    with np.errstate(over="ignore"):
        if load.sum(dtype=np.float64) >= MOST_TOKENS:
            return _load_alone(document, arrays, "2**62 tokens or more")
    arrays["load"] = load.astype(np.int64, copy=False)
    trace = checked_trace(Path(document.name).stem, arrays, _metadata(document), document.error)
    layer_ids = None if trace.layer_ids is None else tuple(trace.layer_ids.tolist())
    return RawLoad(trace.load, layer_ids, metadata=dict(trace.metadata), trace=trace)


def _write_trace(value: Load, options: WriteOptions) -> bytes:
    layer_ids = None if options.layer_ids is None else np.array(options.layer_ids, np.int64)
    known = {name: item for name, item in options.metadata.items() if _fits_metadata(item)}
    left = [f"`{name}`" for name in options.metadata if name not in known]
    if left:
        options.notes.append(f"left out {', '.join(left)}: a trace's metadata are texts and finite numbers")
    arrays = {name: getattr(options.trace, name, None) for name in ("routing", "seq_start", "load_by_rank")}
    arrays |= {"load": whole_counts(value, "evenmoe-trace"), "layer_ids": layer_ids}
    return trace_bytes(checked_trace("trace", arrays, known, partial(FileFormatError, "value")), "value")


def _load_alone(document: Document, arrays: dict[str, np.ndarray], what: str) -> RawLoad:
    load = arrays["load"]
    raw = RawLoad(load[None] if load.ndim == 2 else load)
    if "layer_ids" in arrays:
        whole = {"load": np.broadcast_to(np.int64(0), load.shape), "layer_ids": arrays["layer_ids"]}
        numbers = checked_trace("", whole, {}, document.error).layer_ids
        raw.layer_ids = None if numbers is None else tuple(numbers.tolist())
    left = [f"`{name}`" for name in (*ARRAYS, "metadata") if name in document.fields and name not in _OF_A_LOAD]
    if left:
        raw.notes.append(f"left out {', '.join(left)}: `load` holds {what}, and is no trace's")
    return raw


def _metadata(document: Document) -> object:
    if "metadata" not in document.fields:
        return {}
    text = document.fields["metadata"]
    if text.dtype.kind != "U" or text.shape != ():
        raise not_one_text("metadata", text.shape, text.dtype, document.error)
    return parse_metadata(str(text), document.error)


def _fits_metadata(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)


PLACEMENT = Format(
    ENTRIES["evenmoe-placement"],
    _matches_placement,
    _read_placement,
    _write_placement,
    stores_ranks=True,
    optional_layers=True,
    mtp_layers=True,
    uneven_ranks="any",
    rank_rule=True,
)
TRACE = Format(
    ENTRIES["evenmoe-trace"],
    _matches_trace,
    _read_trace,
    _write_trace,
    optional_layers=True,
    whole_traces=True,
    kept_metadata=None,
)
