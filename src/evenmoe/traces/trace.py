"""`Trace`: routing of one model, recorded or synthetic, and the npz file that holds it.

The file is a numpy .npz without pickled objects. T windows, L layers, E experts, K experts per token, R source ranks:

    array         type                    meaning
    load          integers (T, L, E)      tokens per window, layer and expert; (L, E) is one window. Required
    routing       integers (tokens, L, K) the K distinct experts that every token chose, in order of arrival
    seq_start     integers (requests+1,)  the first token of each request in `routing` and, last, `tokens`
    load_by_rank  integers (T, R, L, E)   `load` by the rank that owned the tokens; (R, L, E) if `load` is (L, E)
    layer_ids     integers (L,)           the model's own number of each layer
    metadata      text ()                 a flat JSON object of texts and finite numbers

Integers are of any width and byte order. Arrays of other names are left alone. What a window is (a request, a step, a
thousand steps) is the recorder's choice. `synthesize` writes the keys "model", "source", "tokens_per_window",
"top_k" and "seed" into `metadata`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.io.npz import MakeError, check_text_length, npz_bytes, read_integers, read_text
from evenmoe.io.output import whole_file

Scalar = str | int | float

#: The arrays of a trace, in the order in which its file holds them; all but the first may be missing.
ARRAYS = ("load", "routing", "seq_start", "load_by_rank", "layer_ids")

#: In a file, so that no sum overflows.
MOST_TOKENS = 1 << 62
# Assignments of `routing` that are compared together: half a MB of 16 bits, which stays in a core's cache.
_AT_ONCE = 1 << 18
_LEADS = ("an array ", "a mapping ", "given ")  # of what a value is; a file's error names the array instead


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of one model, as recorded or synthetic.

    What is given is checked when a trace is made. Integers of other widths and nested lists become the arrays below,
    a load (L, E) becomes one window, and routing of no token becomes None; arrays of these dtypes are not copied.

    Attributes:
        name: where it comes from, for titles.
        load: int64 (T, L, E), tokens per window, layer and expert.
        routing: uint16 (int32 from 65,537 experts on) (tokens, L, K), the experts that every token chose in
            every layer, distinct; or None.
        seq_start: int64 (requests + 1,), the first token of each request in `routing` and, last, the number of tokens;
            or None. Only with `routing`.
        load_by_rank: int64 (T, R, L, E), `load` split over the source ranks; or None.
        layer_ids: int64 (L,), the model's own layer numbers; or None for 0 to L - 1.
        metadata: texts and finite numbers by name, such as "model" or "tokens_per_window".

    Raises:
        ConstraintError: an array that is none of integers, or of another shape, or with a value that it cannot have;
            a message in the words of `load_trace`.

    >>> Trace("one window", [[3, 1]]).load.tolist()
    [[[3, 1]]]
    >>> Trace("one window", [[3, 1]], routing=[[[0]], [[2]]])
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `routing` is an array with ids from 0 to 2: it must hold experts, 0 to 1; record \
ids of the same model as `load`.
    """

    name: str
    load: npt.NDArray[np.int64]
    routing: npt.NDArray[np.integer] | None = None
    seq_start: npt.NDArray[np.int64] | None = None
    load_by_rank: npt.NDArray[np.int64] | None = None
    layer_ids: npt.NDArray[np.int64] | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            value = f"{self.name!r} of type {type(self.name).__name__}"
            raise ConstraintError("name", value, "must be a text", "say where the trace comes from")
        given = {name: value for name in ARRAYS if (value := getattr(self, name)) is not None or name == "load"}
        checked = _checked(**{name: _integers(name, value) for name, value in given.items()})
        checked["metadata"] = _check_metadata(self.metadata)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def num_windows(self) -> int:
        return self.load.shape[0]

    @property
    def num_layers(self) -> int:
        return self.load.shape[1]

    @property
    def num_experts(self) -> int:
        return self.load.shape[2]

    @property
    def top_k(self) -> int | None:
        """K, where the tokens are known."""
        return None if self.routing is None else self.routing.shape[2]

    def of_layers(self, layers: Sequence[int]) -> Trace:
        """The trace of these layers alone, by row, in the given order.

        >>> Trace("two", np.array([[[1, 0], [0, 1]]])).of_layers([1]).load.tolist()
        [[[0, 1]]]
        """
        rows = list(layers)
        return dataclasses.replace(
            self,
            load=self.load[:, rows],
            routing=None if self.routing is None else self.routing[:, rows],
            load_by_rank=None if self.load_by_rank is None else self.load_by_rank[:, :, rows],
            layer_ids=None if self.layer_ids is None else self.layer_ids[rows],
        )


def load_trace(path: str | Path) -> Trace:
    """Read a trace file; its name without the ending becomes the trace's.

    Raises:
        FileFormatError: the file cannot be read, is not an .npz, or its arrays are not those of a trace; the message
            names the file, the array and the rule.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise FileFormatError(
            str(path), f"not readable ({error.strerror})", "must be an existing file", "check the path"
        ) from error
    with file:
        return read_trace(file, path.stem, str(path))


def read_trace(file: BinaryIO, name: str, source: str) -> Trace:
    """As `load_trace`, from an open seekable file; `source` is what errors call it."""
    make_error = partial(FileFormatError, source)
    try:
        with zipfile.ZipFile(file) as archive:
            arrays = {name: array for name in ARRAYS if (array := read_integers(archive, name, make_error)) is not None}
            text = read_text(archive, "metadata", make_error)
            metadata = {} if text is None else parse_metadata(text, make_error)
            names = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist())) or "nothing"
    except FileFormatError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise eleven types
        reason = str(error) or type(error).__name__
        raise make_error(
            f"not an intact .npz file ({reason})", "must be a numpy .npz", "write it with numpy.savez"
        ) from error
    if "load" not in arrays:
        raise make_error(f"a file of {names}", "must hold `load`", "record loads first")
    return checked_trace(name, arrays, metadata, make_error)


def save_trace(path: str | Path, trace: Trace) -> None:
    """Write a trace file, compressed; the same trace gives the same bytes.

    The file appears at once or not at all, and replaces one that is there. The name is not stored: a trace is called
    after its file.

    Raises:
        FileFormatError: the trace's arrays do not fit each other, in the words of `load_trace`; nothing is written.
        OSError: the file cannot be written; `filename` names it, and what was there has not changed.
    """
    data = trace_bytes(trace, str(path))
    with whole_file(path) as file:
        file.write(data)


def trace_bytes(trace: Trace, source: str) -> bytes:
    """The file that `save_trace` writes; `source` is what errors call it."""
    make_error = partial(FileFormatError, source)
    arrays = {name: np.asarray(array) for name in ARRAYS if (array := getattr(trace, name)) is not None}
    checked = checked_trace(trace.name, arrays, trace.metadata, make_error)
    stored = {
        name: array if name == "routing" or array.max(initial=0) >= 1 << 31 else array.astype(np.int32)
        for name in arrays
        if (array := getattr(checked, name)) is not None
    }
    if checked.metadata:
        text = json.dumps(checked.metadata)
        check_text_length(len(text), "metadata", make_error)
        stored["metadata"] = np.array(text)
    return npz_bytes(stored, compress=True)


def checked_trace(name: str, arrays: Mapping[str, object], metadata: object, make_error: MakeError) -> Trace:
    """The trace of these of `ARRAYS`, or the error for the first thing that is wrong with them.

    This is what a trace file may hold, whoever unpacked it.
    """
    try:
        return Trace(name, **arrays, metadata=metadata)  # pyright: ignore[reportArgumentType]
    except ConstraintError as error:
        value = error.value
        for lead in _LEADS:
            value = value.removeprefix(lead)
        raise make_error(f"`{error.argument}` {value}", error.rule, error.fix) from None


def parse_metadata(text: str, make_error: MakeError) -> object:
    """What JSON `text` is, to be checked with the trace."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise make_error(f"`metadata` that is not JSON ({error})", "must be a JSON object", "write it again") from error
    return values


def _integers(name: str, value: object) -> npt.NDArray[np.integer]:
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


def _checked(
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


def _check_metadata(values: object) -> dict[str, Scalar]:
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
