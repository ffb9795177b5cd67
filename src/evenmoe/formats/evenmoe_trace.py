"""evenmoe's trace: .npz with `load` (T, L, E) and what else is known; `evenmoe.traces.trace` says what it may hold.

An .npz whose `load` holds no counts, but parts of tokens or mistakes, is read as a load without the rest.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import whole_counts
from evenmoe.traces.trace import ARRAYS, MOST_TOKENS, Trace, checked_trace, parse_metadata, trace_bytes

_OF_A_LOAD = ("load", "layer_ids")


def matches(document: Document) -> bool:
    return "load" in document.fields


def read(document: Document, options: Options) -> RawLoad:
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
    trace = checked_trace(Path(document.name).stem, arrays, _metadata(document), document.refuse)
    layer_ids = None if trace.layer_ids is None else tuple(trace.layer_ids.tolist())
    return RawLoad(trace.load, layer_ids, metadata=dict(trace.metadata), trace=trace)


def write(value: Load, options: WriteOptions) -> bytes:
    layer_ids = None if options.layer_ids is None else np.array(options.layer_ids, np.int64)
    known = {name: item for name, item in options.metadata.items() if _fits(item)}
    left = [f"`{name}`" for name in options.metadata if name not in known]
    if left:
        options.notes.append(f"left out {', '.join(left)}: a trace's metadata are texts and finite numbers")
    more = {name: getattr(options.trace, name, None) for name in ("routing", "seq_start", "load_by_rank")}
    trace = Trace("trace", whole_counts(value, "evenmoe-trace"), **more, layer_ids=layer_ids, metadata=known)
    return trace_bytes(trace, "value")


def _load_alone(document: Document, arrays: dict[str, np.ndarray], what: str) -> RawLoad:
    load = arrays["load"]
    raw = RawLoad(load[None] if load.ndim == 2 else load)
    if "layer_ids" in arrays:
        whole = {"load": np.broadcast_to(np.int64(0), load.shape), "layer_ids": arrays["layer_ids"]}
        numbers = checked_trace("", whole, {}, document.refuse).layer_ids
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
        raise document.refuse(
            f"`metadata` of dtype {text.dtype} and shape {text.shape}",
            "must be one text",
            "store json.dumps of a flat object",
        )
    return parse_metadata(str(text), document.refuse)


def _fits(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)
