"""`evenmoe simulate`: from options to a replay, its table and its files."""

from __future__ import annotations

import hashlib
import shlex
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evenmoe.cli.report import summary_table
from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.contents import Contents
from evenmoe.metrics import FloatArray, as_load
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.policies import DEFAULT
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.result import Simulation
from evenmoe.simulator.store import save_simulation
from evenmoe.traces.models import MODELS, ModelShape, find_model
from evenmoe.traces.trace import Trace, load_trace

SYNTHETIC = "synthetic:"
_SYNTHETIC_WINDOWS, _REQUEST_WINDOWS = 100, 4
_RANKS_PER_NODE = 8
_MOST_TOKENS, _LARGEST_BITS = 2.0**53, 40
_GAINS = ("mean_par", "worst_par", "step_time_us", "gain_percent", "deduplicated_rows_between_nodes")
_PRICES = ("copies", "refreshes", "refresh_copy_time_us", "break_even_steps", "extra_memory_bytes_per_rank")
_NEEDED = {"expert_flops_per_token": "--expert-flops", "expert_bytes": "--expert-bytes"}


@dataclass(frozen=True)
class Choices:
    """The options of one call; None where the default depends on others."""

    trace: str
    model: str | None
    ranks: int
    nodes: int | None
    tokens_per_rank: int
    chunk: int | None
    top_k: int | None
    steps: int | None
    policies: tuple[str, ...]
    slots: int | None
    groups: int
    refresh: int | None
    window: int | None
    hidden: int | None
    figures: dict[str, float]
    row_per_expert: bool
    out: Path | None
    report: Path | None
    details: bool
    seed: int
    workers: int | None
    map: Path | None
    command: tuple[str, ...]


def run_simulation(choices: Choices, *, as_json: bool) -> None:
    """Replay, write the files that were asked for, and print the table or the object."""
    nodes = choices.nodes
    if nodes is None:
        nodes = choices.ranks // _RANKS_PER_NODE if choices.ranks % _RANKS_PER_NODE == 0 else 1
    Cluster(choices.ranks, nodes, choices.tokens_per_rank)  # says what cannot be before anything is read
    _check_outputs(choices)
    trace, contents = _open_trace(choices)
    model = _find_shape(trace, choices.model)
    top_k = choices.top_k
    if top_k is None and trace.routing is None and "top_k" not in trace.metadata and model is not None:
        top_k = model.top_k
    costs = _cost_model(choices, model)
    with progress_bar("replaying") as progress:
        simulation = simulate(
            trace,
            choices.policies or DEFAULT,
            num_ranks=choices.ranks,
            num_nodes=nodes,
            tokens_per_rank=choices.tokens_per_rank,
            costs=costs,
            num_slots=choices.slots,
            num_groups=choices.groups,
            num_steps=choices.steps,
            refresh=choices.refresh,
            window=choices.window,
            chunk=choices.chunk,
            top_k=top_k,
            seed=choices.seed,
            workers=choices.workers,
            details=choices.details,
            progress=progress,
        )
    if contents is not None:
        simulation = replace(
            simulation,
            notes=(*simulation.notes, *contents.notes),
            empty_windows=simulation.empty_windows + contents.empty_windows,
        )
    digests = _digests(choices.trace)
    simulation = _with_origin(simulation, choices, model, digests)
    if choices.out is not None:
        save_simulation(choices.out, simulation)
    if choices.report is not None:
        from evenmoe.report import write_report

        write_report(simulation, choices.report, shlex.join(choices.command), digests)
    if as_json:
        print_json(simulation.summary.as_json())
    else:
        _print(simulation)


def _check_outputs(choices: Choices) -> None:
    """Refuse to overwrite the trace, or one file by the other, before any time is spent."""
    seen = {Path(choices.trace).resolve(): "the trace"}
    for name, path in (("--out", choices.out), ("--report", choices.report)):
        if path is None:
            continue
        if not path.resolve().parent.is_dir():
            raise ConstraintError(name, path, "must be in a folder that exists", "make the folder first")
        if path.resolve() in seen:
            raise ConstraintError(name, path, f"must not be {seen[path.resolve()]}", "name another file")
        seen[path.resolve()] = f"the file of {name}"


def _open_trace(choices: Choices) -> tuple[Trace, Contents | None]:
    """The trace, and what its file held where that was no trace file."""
    if not choices.trace.startswith(SYNTHETIC):
        return _read_trace(choices.trace, choices.map)
    if choices.map is not None:
        raise ConstraintError("--map", choices.map, "must come with a file, whose slots it holds", "leave it out")
    from evenmoe.traces.synthesis import synthesize

    tokens_per_step = choices.ranks * choices.tokens_per_rank
    streams = tokens_per_step // (choices.chunk or choices.tokens_per_rank)
    trace = synthesize(
        choices.trace.removeprefix(SYNTHETIC),
        num_windows=min(choices.steps or _SYNTHETIC_WINDOWS, _SYNTHETIC_WINDOWS),
        tokens_per_window=tokens_per_step,
        requests=max(1, streams),
        request_windows=_REQUEST_WINDOWS,
        seed=choices.seed,
    )
    return trace, None


def _read_trace(source: str, map_: Path | None) -> tuple[Trace, Contents | None]:
    """A trace file, or the load in a file of any other format, or in either that of the slots of a map."""
    if map_ is None and _is_trace_file(source):
        return load_trace(source), None
    from evenmoe.cli.files import read_map
    from evenmoe.formats.reading import read

    contents = read(source, **({} if map_ is None else read_map(map_, None)))
    if contents.load is None:
        raise ConstraintError(
            source,
            f"a placement ({contents.format})",
            "must be a load or a trace",
            "name a recorded load: policies make their own placements",
        )
    name = "standard input" if source == "-" else Path(source).stem
    if contents.trace is not None:
        return replace(contents.trace, name=name), None  # the replay leaves its empty windows out, and counts them
    return Trace(name, whole_tokens(as_load(contents.load, source))), contents


def whole_tokens(load: FloatArray) -> npt.NDArray[np.int64]:
    """A load (T, L, E) in whole tokens, to draw from: unless it is so already, with 2^40 of them for the largest entry.

    Only ratios inside a layer count there, so parts of tokens, shares and the largest float64 keep their meaning.

    >>> whole_tokens(np.array([[[3.0, 1.0]]])).tolist(), (whole_tokens(np.array([[[0.75, 0.25]]])) >> 38).tolist()
    ([[[3, 1]]], [[[3, 1]]])
    """
    with np.errstate(over="ignore"):
        total = load.sum()
    if total < _MOST_TOKENS and (load == np.rint(load)).all():
        return load.astype(np.int64)
    return np.rint(np.ldexp(load, _LARGEST_BITS - np.frexp(load.max())[1])).astype(np.int64)


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


def _find_shape(trace: Trace, name: str | None) -> ModelShape | None:
    """The model that is named, or that the trace names, or that alone has the trace's layers and experts."""
    if name is not None:
        return find_model(name)
    named = trace.metadata.get("model")
    if isinstance(named, str):
        try:
            return find_model(named)
        except ConstraintError:
            pass  # a trace may be of a model that is not listed
    top_k = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    fitting = [
        shape
        for shape in MODELS.values()
        if (shape.num_layers, shape.num_experts) == (trace.num_layers, trace.num_experts)
        and top_k in (None, shape.top_k)
    ]
    alike = {(shape.hidden, shape.intermediate, shape.weight_bytes, shape.top_k) for shape in fitting}
    return fitting[0] if len(alike) == 1 else None


def _cost_model(choices: Choices, model: ModelShape | None) -> CostModel:
    figures: dict[str, Any] = {**choices.figures, "one_row_per_rank": not choices.row_per_expert}
    if model is not None:
        figures.setdefault("expert_bytes", model.expert_bytes)
        figures.setdefault("expert_flops_per_token", model.expert_flops_per_token)
    hidden = choices.hidden if choices.hidden is not None or model is None else model.hidden
    missing = [option for figure, option in _NEEDED.items() if figure not in figures]
    if hidden is None and not {"dispatch_row_bytes", "combine_row_bytes"} <= figures.keys():
        missing.append("--hidden")
    if missing:
        raise MissingArgumentError(
            "--model",
            "not given, and the trace is of no known model",
            "must name one of them, for the sizes of experts and rows",
            f"use --model with one of {', '.join(MODELS)}; or give {', '.join(missing)}",
        )
    flops, size = figures.pop("expert_flops_per_token"), figures.pop("expert_bytes")
    return CostModel.for_expert(hidden or 0, size, flops, **figures)


def _with_origin(
    simulation: Simulation, choices: Choices, model: ModelShape | None, digests: dict[str, str]
) -> Simulation:
    """With the command, the model and what the trace's bytes were, in front of the other settings."""
    rows = [("command", shlex.join(choices.command), ""), ("model", "not known" if model is None else model.name, "")]
    rows += [(f"SHA-256 of {path}", digest, "") for path, digest in digests.items()]
    return replace(simulation, settings=(*rows, *simulation.settings))


def _digests(trace: str) -> dict[str, str]:
    if trace.startswith(SYNTHETIC) or not Path(trace).is_file():
        return {}
    with Path(trace).open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {trace: digest.hexdigest()}


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on standard error, if that is a terminal; call it with steps done and steps in all."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(simulation: Simulation) -> None:
    """Two tables, because one would not fit 80 columns: what a policy gains, and what it costs."""
    summary = simulation.summary
    print(
        f"{summary.trace}: {summary.num_steps} steps of {summary.tokens_per_step:,} tokens "
        f"on {summary.num_ranks} ranks, {summary.num_nodes} nodes"
        + (f"; {summary.num_empty_windows:,} empty windows left out" if summary.num_empty_windows else "")
    )
    console = Console()
    console.print(summary_table(summary, _GAINS))
    console.print(summary_table(summary, _PRICES))
    notes = Console(stderr=True)
    for note in summary.notes:
        notes.print(note, style="dim", markup=False, highlight=False)
