"""The trace that a simulation is given: a synthetic one, a trace file, or the load in a file of any other format."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.cli.options import FileOptions
from evenmoe.formats.contents import Contents
from evenmoe.formats.reading import read_load
from evenmoe.metrics import FloatArray, as_load
from evenmoe.simulator.fixed import placement_file
from evenmoe.traces.trace import Trace, load_trace
from evenmoe.traces.trace_arrays import MOST_TOKENS

SYNTHETIC = "synthetic:"
_SYNTHETIC_WINDOWS, _REQUEST_WINDOWS = 100, 4
_MOST_TOKENS, _LARGEST_BITS = 2.0**53, 40
_MOST_TOGETHER = MOST_TOKENS / 2  # so that rounding cannot lead beyond what a trace holds


def synthetic_trace(model: str, tokens: int, streams: int, steps: int | None, seed: int) -> Trace:
    """Draw a trace of the model, with as many tokens and requests in a window as a step has tokens and streams."""
    from evenmoe.traces.synthesis import synthesize

    return synthesize(
        model,
        num_windows=min(steps or _SYNTHETIC_WINDOWS, _SYNTHETIC_WINDOWS),
        tokens_per_window=tokens,
        requests=streams,
        request_windows=_REQUEST_WINDOWS,
        seed=seed,
    )


def read_trace(source: str, files: FileOptions) -> tuple[Trace, Contents | None]:
    """Read the trace, and return what its file held where that was no trace file.

    Raises:
        ConstraintError: it holds a placement.
    """
    if not files.given_of_file() and _is_trace_file(source):
        return load_trace(source), None
    contents = read_load(source, files.read_options())
    assert contents.load is not None
    name = "standard input" if source == "-" else Path(source).stem
    if contents.trace is not None:
        return replace(contents.trace, name=name), None  # the replay leaves its empty windows out, and counts them
    return Trace(name, whole_tokens(as_load(contents.load, source))), contents


def whole_tokens(load: FloatArray) -> npt.NDArray[np.int64]:
    """Return a load (T, L, E) in whole tokens, to draw from: where it is not so already, its largest entry has 2^40.

    It has fewer where all entries together would be too many for a trace.

    Only ratios inside a layer count there, so parts of tokens, shares and the largest float64 keep their meaning.

    >>> whole_tokens(np.array([[[3.0, 1.0]]])).tolist(), (whole_tokens(np.array([[[0.75, 0.25]]])) >> 38).tolist()
    ([[[3, 1]]], [[[3, 1]]])
    """
    with np.errstate(over="ignore"):
        total = load.sum()
    if total < _MOST_TOKENS and (load == np.rint(load)).all():
        return load.astype(np.int64)
    scaled = np.ldexp(load, _LARGEST_BITS - np.frexp(load.max())[1])
    if scaled.sum() >= _MOST_TOGETHER:
        scaled = np.ldexp(scaled, np.frexp(_MOST_TOGETHER / scaled.sum())[1] - 1)
    return np.rint(scaled).astype(np.int64)


def digests(source: str, policies: Iterable[str] = ()) -> dict[str, str]:
    """Return {path: SHA-256} of the trace's file and of placements that are policies, as far as they are files."""
    found = {}
    for path in dict.fromkeys([source, *filter(None, map(placement_file, policies))]):
        if (path is source and source.startswith(SYNTHETIC)) or not Path(path).is_file():
            continue
        with Path(path).open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        found[path] = digest.hexdigest()
    return found


def _is_trace_file(source: str) -> bool:
    """Whether the file has `load` as an .npz has it; also where there is none, so that the trace's reader says so."""
    if source == "-":
        return False
    path = Path(source)
    if not path.exists():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "load.npy" in archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
