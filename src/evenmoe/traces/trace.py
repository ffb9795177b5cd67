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
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, FileFormatError, UnsupportedTypeError
from evenmoe.io.npz import MakeError, check_text_length, npz_bytes, read_integers, read_text
from evenmoe.io.output import whole_file
from evenmoe.traces.trace_arrays import ARRAYS, Scalar, check_metadata, checked_arrays, integers

_LEADS = ("an array ", "a mapping ", "given ")  # of what a value is; a file's error names the array instead


@dataclass(frozen=True, eq=False, repr=False)
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
        checked = checked_arrays(**{name: integers(name, value) for name, value in given.items()})
        checked["metadata"] = check_metadata(self.metadata)
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
