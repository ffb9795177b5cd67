"""What the arrays and the metadata of a trace must be, and the errors that say so, for traces made and for files."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError

Scalar = str | int | float

#: The arrays of a trace, in the order in which its file holds them; all but the first may be missing.
ARRAYS = ("load", "routing", "seq_start", "load_by_rank", "layer_ids")

#: In a file, so that no sum overflows.
MOST_TOKENS = 1 << 62
# Assignments of `routing` that are compared together: half a MB of 16 bits, which stays in a core's cache.
_AT_ONCE = 1 << 18


def integers(name: str, value: object) -> npt.NDArray[np.integer]:
    """What is given for an array, as one."""
    try:
        array = np.asarray(value)
    except Exception as error:  # what torch and numpy raise for what is no array: five types at least
        reason = " ".join(str(error).split())[:80]
        what = f"a {type(value).__name__} that is no array ({reason})"
        raise ConstraintError(name, what, "must hold integers, rows of one length", "pass a numpy array") from None
    if array.dtype.kind not in "iu":
        raise ConstraintError(
            name, f"an array of dtype {array.dtype}", "must hold integers", "convert it with .astype(np.int64)"
        )
    return array


def checked_arrays(
    load: npt.NDArray[np.integer],
    routing: npt.NDArray[np.integer] | None = None,
    seq_start: npt.NDArray[np.integer] | None = None,
    load_by_rank: npt.NDArray[np.integer] | None = None,
    layer_ids: npt.NDArray[np.integer] | None = None,
) -> dict[str, object]:
    """These arrays as a trace has them, or a ConstraintError for the first thing that is wrong with them."""
    if load_by_rank is not None and load.ndim == 2 and load_by_rank.ndim == 3:
        load_by_rank = load_by_rank[None]
    load = _check_load(load)
    chosen = None if routing is None else _check_routing(routing, load)
    if seq_start is not None:
        seq_start = _check_seq_start(seq_start, None if routing is None else len(routing))
    return {
        "load": load,
        "routing": chosen,
        "seq_start": None if chosen is None else seq_start,
        "load_by_rank": None if load_by_rank is None else _check_load_by_rank(load_by_rank, load),
        "layer_ids": None if layer_ids is None else _check_layer_ids(layer_ids, load.shape[1]),
    }


def _check_load(load: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if load.ndim == 2:
        load = load[None]
    if load.ndim != 3 or load.size == 0:
        raise ConstraintError(
            "load",
            f"an array of shape {load.shape}",
            "must be (windows, layers, experts), no axis empty",
            "record one row of experts per window and layer",
        )
    return _check_counts("load", load)


def _check_counts(name: str, counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if counts.min() < 0 or counts.sum(dtype=np.float64) >= MOST_TOKENS:
        raise ConstraintError(
            name,
            f"an array with counts from {counts.min()} to {counts.max()}",
            "must hold token counts, not negative, fewer than 2**62 together",
            "check how it was recorded",
        )
    return counts.astype(np.int64, copy=False)


def _check_routing(routing: npt.NDArray[np.integer], load: npt.NDArray[np.int64]) -> npt.NDArray[np.integer] | None:
    layers, experts = load.shape[-2:]
    if routing.ndim != 3 or routing.shape[1] != layers or routing.shape[2] < 1:
        raise ConstraintError(
            "routing",
            f"an array of shape {routing.shape}",
            f"must be (tokens, {layers}, k)",
            "record one row per token",
        )
    if routing.size and (routing.min() < 0 or routing.max() >= experts):
        raise ConstraintError(
            "routing",
            f"an array with ids from {routing.min()} to {routing.max()}",
            f"must hold experts, 0 to {experts - 1}",
            "record ids of the same model as `load`",
        )
    chosen = routing.astype(np.uint16 if experts <= 1 << 16 else np.int32, copy=False)
    tokens = max(1, _AT_ONCE // (layers * routing.shape[2]))
    for start in range(0, len(chosen), tokens):
        part = chosen[start : start + tokens]
        # By k first, rows of one length are compared at once: a twelfth of the time of sorting each token's experts.
        by_k = np.ascontiguousarray(part.transpose(2, 0, 1))
        if any((by_k[apart:] == by_k[:-apart]).any() for apart in range(1, len(by_k))):
            in_order = np.sort(part, axis=2)
            token, layer, k = np.argwhere(in_order[:, :, 1:] == in_order[:, :, :-1])[0]
            raise ConstraintError(
                "routing",
                f"an array with expert {in_order[token, layer, k]} twice for token {start + token}, layer {layer}",
                "must hold distinct experts per token and layer",
                "record the top-k as the model chose them",
            )
    return chosen if len(chosen) else None


def _check_seq_start(seq_start: npt.NDArray[np.integer], tokens: int | None) -> npt.NDArray[np.int64]:
    if tokens is None:
        raise ConstraintError(
            "seq_start", "given without `routing`", "must split the tokens of `routing`", "leave it out"
        )
    if seq_start.ndim != 1 or len(seq_start) < 1 or seq_start[0] != 0 or seq_start[-1] != tokens:
        ends = f" from {seq_start[0]} to {seq_start[-1]}" if seq_start.ndim == 1 and len(seq_start) else ""
        raise ConstraintError(
            "seq_start",
            f"an array of shape {seq_start.shape}{ends}",
            f"must be one row from 0 to the {tokens} tokens of `routing`",
            "record the first token of every request and, last, the number of tokens",
        )
    falls = seq_start[1:] < seq_start[:-1]  # a difference of unsigned integers would wrap
    if falls.any():
        request = int(falls.argmax())
        raise ConstraintError(
            "seq_start",
            f"an array with {seq_start[request + 1]} after {seq_start[request]} at request {request}",
            "must not fall",
            "order the requests as their tokens are",
        )
    return seq_start.astype(np.int64, copy=False)


def _check_load_by_rank(by_rank: npt.NDArray[np.integer], load: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    windows, layers, experts = load.shape
    if by_rank.ndim != 4 or by_rank.size == 0 or (by_rank.shape[0], *by_rank.shape[2:]) != load.shape:
        raise ConstraintError(
            "load_by_rank",
            f"an array of shape {by_rank.shape}",
            f"must be ({windows}, ranks, {layers}, {experts}), as `load` is",
            "record the ranks' loads of the same windows",
        )
    by_rank = _check_counts("load_by_rank", by_rank)
    together = by_rank.sum(axis=1)
    if (together != load).any():
        window, layer, expert = np.argwhere(together != load)[0]
        raise ConstraintError(
            "load_by_rank",
            f"an array with {together[window, layer, expert]} tokens over the ranks where `load` has "
            f"{load[window, layer, expert]} (window {window}, layer {layer}, expert {expert})",
            "must sum to `load` over the ranks",
            "record both from the same tokens",
        )
    return by_rank


def _check_layer_ids(layer_ids: npt.NDArray[np.integer], layers: int) -> npt.NDArray[np.int64]:
    if layer_ids.shape != (layers,):
        raise ConstraintError(
            "layer_ids",
            f"an array of shape {layer_ids.shape}",
            f"must be ({layers},)",
            "give one number to every layer of `load`",
        )
    if layer_ids.min() < 0 or layer_ids.max() > np.iinfo(np.int64).max or len(set(layer_ids.tolist())) < layers:
        raise ConstraintError(
            "layer_ids",
            f"{layer_ids.tolist()[:64]}",
            "must be distinct and not negative",
            "use the model's own layer numbers, or leave it out",
        )
    return layer_ids.astype(np.int64, copy=False)


def check_metadata(values: object) -> dict[str, Scalar]:
    """`values` as a dict of texts and finite numbers under text keys, in sorted order."""
    if not isinstance(values, Mapping):
        what = f"of type {type(values).__name__}"
        raise ConstraintError("metadata", what, "must be an object", "give names to its values")
    for key, value in values.items():
        good = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not isinstance(key, str) or not good or (isinstance(value, float) and not math.isfinite(value)):
            raise ConstraintError(
                "metadata",
                f"a mapping with {key!r}: {str(value)[:60]}",
                "must hold texts and finite numbers under text keys",
                "leave other values out, or write them as text",
            )
    return dict(sorted(values.items()))
