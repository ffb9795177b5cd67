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

from evenmoe.errors import FileFormatError, UnsupportedTypeError
from evenmoe.io.npz import MakeError, check_text_length, npz_bytes, read_integers, read_text
from evenmoe.io.output import whole_file

Scalar = str | int | float

#: The arrays of a trace, in the order in which its file holds them; all but the first may be missing.
ARRAYS = ("load", "routing", "seq_start", "load_by_rank", "layer_ids")

#: In a file, so that no sum overflows.
MOST_TOKENS = 1 << 62
_TOKENS_AT_ONCE = 1 << 12  # of `routing`, checked together: 58 layers with top-8 are then 4 MB


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Routing of one model, as recorded or synthetic.

    Attributes:
        name: where it comes from, for titles.
        load: int64 (T, L, E), tokens per window, layer and expert.
        routing: uint16 (int32 from 65,537 experts on, or int64) (tokens, L, K), the experts that every token chose in
            every layer, distinct; or None.
        seq_start: int64 (requests + 1,), the first token of each request in `routing` and, last, the number of tokens;
            or None. Only with `routing`.
        load_by_rank: int64 (T, R, L, E), `load` split over the source ranks; or None.
        layer_ids: int64 (L,), the model's own layer numbers; or None for 0 to L - 1.
        metadata: texts and finite numbers by name, such as "model" or "tokens_per_window".
    """

    name: str
    load: npt.NDArray[np.int64]
    routing: npt.NDArray[np.integer] | None = None
    seq_start: npt.NDArray[np.int64] | None = None
    load_by_rank: npt.NDArray[np.int64] | None = None
    layer_ids: npt.NDArray[np.int64] | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

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

    def save(self, path: str | Path) -> None:
        """Write the trace to a file that `load_trace` reads; see `save_trace`."""
        save_trace(self, path)

    def __repr__(self) -> str:
        """One line of sizes, not the arrays.

        >>> Trace("ring", np.array([[[3, 1]]]), np.zeros((4, 1, 1), np.uint16))
        Trace('ring', windows=1, layers=1, experts=2, tokens=4, top_k=1)
        """
        sizes: dict[str, object] = {"windows": self.num_windows, "layers": self.num_layers, "experts": self.num_experts}
        if self.routing is not None:
            sizes |= {"tokens": len(self.routing), "top_k": self.top_k}
        if self.seq_start is not None:
            sizes["requests"] = len(self.seq_start) - 1
        if self.load_by_rank is not None:
            sizes["source_ranks"] = self.load_by_rank.shape[1]
        if "model" in self.metadata:
            sizes["model"] = self.metadata["model"]
        return f"Trace({self.name!r}, {', '.join(f'{name}={value}' for name, value in sizes.items())})"


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


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace file, compressed; the same trace gives the same bytes.

    The file appears at once or not at all, and replaces one that is there. The name is not stored: a trace is called
    after its file.

    Raises:
        UnsupportedTypeError: something that is no trace, such as the path in its place.
        FileFormatError: the trace's arrays do not fit each other, in the words of `load_trace`; nothing is written.
        OSError: the file cannot be written; `filename` names it, and what was there has not changed.
    """
    if not isinstance(trace, Trace):
        fix = "call save_trace(trace, path), the trace first" if isinstance(path, Trace) else "pass a Trace"
        raise UnsupportedTypeError("trace", f"of type {type(trace).__name__}", "must be a Trace", fix)
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


def checked_trace(
    name: str, arrays: Mapping[str, npt.NDArray[np.generic]], metadata: object, make_error: MakeError
) -> Trace:
    """The trace of these of `ARRAYS`, or the error for the first thing that is wrong with them.

    This is what a trace file may hold, whoever unpacked it.
    """
    for array_name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise make_error(
                f"`{array_name}` of dtype {array.dtype}", "must hold integers", "convert it with .astype(np.int64)"
            )
    return _checked(name, **arrays, metadata=metadata, make_error=make_error)  # pyright: ignore[reportArgumentType]


def parse_metadata(text: str, make_error: MakeError) -> dict[str, Scalar]:
    """The flat JSON object that `text` is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise make_error(f"`metadata` that is not JSON ({error})", "must be a JSON object", "write it again") from error
    return _check_metadata(values, make_error)


def _checked(
    name: str,
    load: npt.NDArray[np.integer],
    routing: npt.NDArray[np.integer] | None = None,
    seq_start: npt.NDArray[np.integer] | None = None,
    load_by_rank: npt.NDArray[np.integer] | None = None,
    layer_ids: npt.NDArray[np.integer] | None = None,
    *,
    metadata: object,
    make_error: MakeError,
) -> Trace:
    """The trace of these arrays, or the first thing that is wrong with them."""
    if load_by_rank is not None and load.ndim == 2 and load_by_rank.ndim == 3:
        load_by_rank = load_by_rank[None]
    load = _check_load(load, make_error)
    chosen = None if routing is None else _check_routing(routing, load, make_error)
    if seq_start is not None:
        seq_start = _check_seq_start(seq_start, None if routing is None else len(routing), make_error)
    return Trace(
        name,
        load,
        chosen,
        None if chosen is None else seq_start,
        None if load_by_rank is None else _check_load_by_rank(load_by_rank, load, make_error),
        None if layer_ids is None else _check_layer_ids(layer_ids, load.shape[1], make_error),
        _check_metadata(metadata, make_error),
    )


def _check_load(load: npt.NDArray[np.integer], make_error: MakeError) -> npt.NDArray[np.int64]:
    if load.ndim == 2:
        load = load[None]
    if load.ndim != 3 or load.size == 0:
        raise make_error(
            f"`load` of shape {load.shape}",
            "must be (windows, layers, experts), no axis empty",
            "record one row of experts per window and layer",
        )
    if load.min() < 0 or load.sum(dtype=np.float64) >= MOST_TOKENS:
        raise make_error(
            f"`load` with counts from {load.min()} to {load.max()}",
            "must hold token counts, not negative, fewer than 2**62 together",
            "check how it was recorded",
        )
    return load.astype(np.int64, copy=False)


def _check_routing(
    routing: npt.NDArray[np.integer], load: npt.NDArray[np.int64], make_error: MakeError
) -> npt.NDArray[np.integer] | None:
    layers, experts = load.shape[-2:]
    if routing.ndim != 3 or routing.shape[1] != layers or routing.shape[2] < 1:
        raise make_error(
            f"`routing` of shape {routing.shape}", f"must be (tokens, {layers}, k)", "record one row per token"
        )
    if routing.size and (routing.min() < 0 or routing.max() >= experts):
        raise make_error(
            f"`routing` with ids from {routing.min()} to {routing.max()}",
            f"must hold experts, 0 to {experts - 1}",
            "record ids of the same model as `load`",
        )
    for start in range(0, len(routing), _TOKENS_AT_ONCE):
        in_order = np.sort(routing[start : start + _TOKENS_AT_ONCE], axis=2)
        twice = in_order[:, :, 1:] == in_order[:, :, :-1]
        if twice.any():
            token, layer, k = np.argwhere(twice)[0]
            raise make_error(
                f"`routing` with expert {in_order[token, layer, k]} twice for token {start + token}, layer {layer}",
                "must hold distinct experts per token and layer",
                "record the top-k as the model chose them",
            )
    return routing.astype(np.uint16 if experts <= 1 << 16 else np.int32, copy=False) if len(routing) else None


def _check_seq_start(
    seq_start: npt.NDArray[np.integer], tokens: int | None, make_error: MakeError
) -> npt.NDArray[np.int64]:
    if tokens is None:
        raise make_error("`seq_start` without `routing`", "must split the tokens of `routing`", "leave it out")
    if seq_start.ndim != 1 or len(seq_start) < 1 or seq_start[0] != 0 or seq_start[-1] != tokens:
        ends = f" from {seq_start[0]} to {seq_start[-1]}" if seq_start.ndim == 1 and len(seq_start) else ""
        raise make_error(
            f"`seq_start` of shape {seq_start.shape}{ends}",
            f"must be one row from 0 to the {tokens} tokens of `routing`",
            "record the first token of every request and, last, the number of tokens",
        )
    falls = seq_start[1:] < seq_start[:-1]  # a difference of unsigned integers would wrap
    if falls.any():
        request = int(falls.argmax())
        raise make_error(
            f"`seq_start` with {seq_start[request + 1]} after {seq_start[request]} at request {request}",
            "must not fall",
            "order the requests as their tokens are",
        )
    return seq_start.astype(np.int64, copy=False)


def _check_load_by_rank(
    by_rank: npt.NDArray[np.integer], load: npt.NDArray[np.int64], make_error: MakeError
) -> npt.NDArray[np.int64]:
    windows, layers, experts = load.shape
    if by_rank.ndim != 4 or by_rank.size == 0 or (by_rank.shape[0], *by_rank.shape[2:]) != load.shape:
        raise make_error(
            f"`load_by_rank` of shape {by_rank.shape}",
            f"must be ({windows}, ranks, {layers}, {experts}), as `load` is",
            "record the ranks' loads of the same windows",
        )
    if by_rank.min() < 0 or by_rank.sum(dtype=np.float64) >= MOST_TOKENS:
        raise make_error(
            f"`load_by_rank` with counts from {by_rank.min()} to {by_rank.max()}",
            "must hold token counts, not negative, fewer than 2**62 together",
            "check how it was recorded",
        )
    by_rank = by_rank.astype(np.int64, copy=False)
    together = by_rank.sum(axis=1)
    if (together != load).any():
        window, layer, expert = np.argwhere(together != load)[0]
        raise make_error(
            f"`load_by_rank` with {together[window, layer, expert]} tokens over the ranks where `load` has "
            f"{load[window, layer, expert]} (window {window}, layer {layer}, expert {expert})",
            "must sum to `load` over the ranks",
            "record both from the same tokens",
        )
    return by_rank


def _check_layer_ids(layer_ids: npt.NDArray[np.integer], layers: int, make_error: MakeError) -> npt.NDArray[np.int64]:
    if layer_ids.shape != (layers,):
        raise make_error(
            f"`layer_ids` of shape {layer_ids.shape}",
            f"must be ({layers},)",
            "give one number to every layer of `load`",
        )
    if layer_ids.min() < 0 or layer_ids.max() > np.iinfo(np.int64).max or len(set(layer_ids.tolist())) < layers:
        raise make_error(
            f"`layer_ids` {layer_ids.tolist()[:64]}",
            "must be distinct and not negative",
            "use the model's own layer numbers, or leave it out",
        )
    return layer_ids.astype(np.int64, copy=False)


def _check_metadata(values: object, make_error: MakeError) -> dict[str, Scalar]:
    """`values` as a dict of texts and finite numbers under text keys, in sorted order."""
    if not isinstance(values, Mapping):
        raise make_error(f"`metadata` of type {type(values).__name__}", "must be an object", "give names to its values")
    for key, value in values.items():
        good = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not isinstance(key, str) or not good or (isinstance(value, float) and not math.isfinite(value)):
            raise make_error(
                f"`metadata` with {key!r}: {str(value)[:60]}",
                "must hold texts and finite numbers under text keys",
                "leave other values out, or write them as text",
            )
    return dict(sorted(values.items()))
