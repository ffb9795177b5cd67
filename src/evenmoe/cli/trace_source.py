"""The trace that a simulation is given: a synthetic one, a trace file, or the load in a file of any other format."""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.cli.options import FileOptions
from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import Contents
from evenmoe.formats.reading import read_load
from evenmoe.metrics import FloatArray, as_load
from evenmoe.traces.models import MODELS, ModelShape, find_model
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


def find_shape(trace: Trace, name: str | None) -> ModelShape | None:
    """Find the model that is named, or that the trace's metadata names, or that alone can have recorded it.

    That has its experts, the experts of a token where they are known, and its layers: all of them, or else those that
    the trace numbers. Of several the one counts whose name stands in the trace's.

    >>> part = Trace("olmoe_base", np.ones((1, 2, 64), np.int64), layer_ids=np.array([0, 15]))
    >>> find_shape(part, None).name
    'olmoe-1b-7b'
    """
    if name is not None:
        return find_model(name)
    named = trace.metadata.get("model")
    if isinstance(named, str):
        try:
            return find_model(named)
        except ConstraintError:
            pass  # a trace may be of a model that is not listed
    top_k = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    alike = [
        shape for shape in MODELS.values() if shape.num_experts == trace.num_experts and top_k in (None, shape.top_k)
    ]
    whole = [shape for shape in alike if shape.num_layers == trace.num_layers]
    part = [] if trace.layer_ids is None else [s for s in alike if set(trace.layer_ids.tolist()) <= set(s.layer_ids)]
    return _only(whole, trace.name) or _only(part, trace.name)


def _only(shapes: list[ModelShape], title: str) -> ModelShape | None:
    """The one of these shapes, up to their names, or the one whose name begins like a part of the title."""
    letters = re.sub("[^a-z0-9]", "", title.lower())
    for fitting in (
        shapes,
        [shape for shape in shapes if re.sub("[^a-z]", "", shape.name.partition("-")[0]) in letters],
    ):
        if len({(shape.hidden, shape.intermediate, shape.weight_bytes, shape.top_k) for shape in fitting}) == 1:
            return fitting[0]
    return None


def digests(source: str) -> dict[str, str]:
    """Return {path: SHA-256} of the trace's file, if it is one."""
    if source.startswith(SYNTHETIC) or not Path(source).is_file():
        return {}
    with Path(source).open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {source: digest.hexdigest()}


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
