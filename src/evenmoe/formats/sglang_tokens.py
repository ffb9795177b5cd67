"""The tokens of SGLang's recorder in mode per_token: which experts each of them chose.

A record has `topk_ids_of_layer` (L, tokens, 8), slots, and -1 where a model chooses fewer than the 8 that the
recorder's code fixes (it fails for a model that chooses more), where a token was padded, and in dense layers.
`extend_seq_lens` are the tokens of each request in a pass of prefill; in a pass of decode every token is another
request's, and nothing says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenmoe.formats.contents import IntArray, RawLoad
from evenmoe.formats.document import Document
from evenmoe.formats.tokens import distinct
from evenmoe.io import Value
from evenmoe.traces.trace import checked_trace

TOKENS = "topk_ids_of_layer"
_LENGTHS = "extend_seq_lens"


@dataclass(frozen=True)
class Tokens:
    """Tokens of one rank in one pass: `experts` (tokens, L, 8), -1 for none; `lengths` of requests, if it says them."""

    experts: np.ndarray
    lengths: tuple[int, ...] | None


def chosen_slots(document: Document, record: Mapping[str, Value], slots: IntArray, where: str) -> IntArray:
    """The slots that tokens chose (L, tokens, 8), -1 for none. Raises FileFormatError."""
    value = record.get(TOKENS)
    layers, width = slots.shape
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == layers and not value.shape[1]:
        return np.zeros((layers, 0, 1), np.int64)  # a rank that had no token in this pass
    ids = document.numbers(value, f"{where}.{TOKENS}", (3,), integers=True)
    if len(ids) != layers or ids.min() < -1 or ids.max() >= width:
        raise document.error(
            f"with {where}.{TOKENS} of shape {ids.shape}, slots {ids.min()} to {ids.max()}",
            f"must have {layers} layers and slots -1 to {width - 1}",
            "record again",
        )
    return ids


def tokens_of(document: Document, record: Mapping[str, Value], slots: IntArray, where: str) -> Tokens | None:
    """The tokens of a record; None of one that only counts. Raises FileFormatError."""
    if TOKENS not in record:
        return None
    ids = chosen_slots(document, record, slots, where)
    experts = np.where(ids < 0, -1, slots[np.arange(len(slots))[:, None, None], ids]).astype(np.int32)
    found = record.get(_LENGTHS)
    lengths = found.tolist() if isinstance(found, np.ndarray) and found.ndim == 1 else found
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n >= 0 for n in lengths):
        lengths = None
    if lengths is not None and sum(lengths) != ids.shape[1]:  # a padded batch
        lengths = None
    return Tokens(np.moveaxis(experts, 0, 1), None if lengths is None else tuple(lengths))


def add_routing(document: Document, raw: RawLoad, recorded: Sequence[Tokens | None]) -> None:
    """Give a load the trace of its tokens, where all its records have them; or say why it has none."""
    parts = [part for part in recorded if part is not None]
    if not parts or raw.load.dtype.kind != "i" or raw.layer_ids is None:
        return
    if len(parts) < len(recorded):
        raw.notes.append("left out the tokens: some records only count them")
        return
    wide = max(part.experts.shape[2] for part in parts)
    if any(part.experts.shape[2] != wide for part in parts if len(part.experts)):
        raw.notes.append("left out the tokens: records keep different numbers of experts")
        return
    experts = np.concatenate([part.experts[:, list(raw.layer_ids)] for part in parts if len(part.experts)])
    held = (experts >= 0).sum(axis=2)
    top_k = int(held.max())
    kept = (held == top_k).all(axis=1)
    first = np.argsort(experts < 0, axis=2, kind="stable")[:, :, :top_k]
    experts = np.take_along_axis(experts, first, axis=2)
    kept &= distinct(experts).all(axis=1)
    if not kept.any():
        raw.notes.append(f"left out the tokens: none of them has {top_k} different experts in every layer")
        return
    if not kept.all():
        raw.notes.append(
            f"counted {int((~kept).sum())} of {len(kept)} tokens, but left them out of the routing: they do not have "
            f"{top_k} different experts in every layer"
        )
    lengths = np.array([n for part in parts for n in part.lengths or [1] * len(part.experts)], np.int64)
    ends = np.cumsum(kept)[np.cumsum(lengths)[lengths > 0] - 1]
    arrays = {
        "load": raw.load,
        "routing": experts[kept],
        "seq_start": np.unique(np.r_[0, ends]),
        "layer_ids": np.array(raw.layer_ids),
    }
    raw.trace = checked_trace(Path(document.name).stem, arrays, {}, document.error)
    raw.notes.append(f"kept the routing of {int(kept.sum())} tokens, {top_k} experts each")
