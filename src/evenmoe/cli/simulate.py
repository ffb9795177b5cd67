"""`evenmoe simulate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import (
    FileOptions,
    WorldOptions,
    check_no_stream,
    completed,
    find_engine,
    for_option,
    make_command,
    out_option,
    print_json,
)
from evenmoe.cli.report import print_headline, print_unable, summary_table
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.planner import PLANNERS
from evenmoe.rules import RULES
from evenmoe.traces.models import MODELS, ModelShape, shape_of

if TYPE_CHECKING:
    from rich.console import Console

    from evenmoe.costs.hardware import Phase
    from evenmoe.formats.contents import Contents
    from evenmoe.simulator.costs import CostModel
    from evenmoe.simulator.result import Summary
    from evenmoe.traces.trace import Trace

#: Options that are the figures of `CostModel` of the same names, which has the defaults.
_FIGURES = (
    *("copy_bytes", "dispatch_row_bytes", "combine_row_bytes", "flops_per_s", "memory_bytes_per_s"),
    *("within_bytes_per_s", "between_bytes_per_s", "latency_us"),
    *("start_us", "slot_us", "floor_us", "token_us", "norm", "tile"),
)
_GAINS = ("mean_par", "worst_par", "step_time_us", "gain_percent", "deduplicated_rows_between_nodes")
_PRICES = ("copies", "refreshes", "refresh_copy_time_us", "break_even_steps", "extra_memory_bytes_per_rank")
_POLICIES = ("identity", "static", *PLANNERS, "oracle")
_POLICY_HELP = (
    "NAME[:key=value,...], once per policy. identity (the default placement, always compared with): rule. static: "
    "rule, slots, groups, window, pieces, planner, plan-for. greedy (published): rule, slots, groups, refresh, window. "
    "evenmoe: rule, slots, groups, refresh, window, pieces, plan-for, max-copies, target-par, "
    "start=first|previous|scratch. own (of --for's engine): slots, groups. "
    "oracle: rule, slots, groups, planner, plan-for. file:PATH, a placement in any "
    "format: rule. py:module:attribute: your own planner, rule, placement or policy. Planners: "
    f"{', '.join(PLANNERS)}. Rules: {', '.join(RULES)}. Without any: all kinds."
)


def complete_gpu(incomplete: str) -> list[str]:
    """Names of accelerators that begin so."""
    from evenmoe.costs import hardware_names

    return [name for name in (*hardware_names(), "cpu") if name.casefold().startswith(incomplete.casefold())]


@dataclass(frozen=True, kw_only=True)
class SimulateCommand(FileOptions, WorldOptions):
    """Replay a trace under several policies: balance, token rows communicated, copies, time, memory.

    A trace with tokens is replayed assignment by assignment; from loads alone, counts are drawn. Plans see only steps
    that are over. Times come from a model of the experts and the network alone, whose every figure is an option. Exit
    codes: 0 done; 2 an option, the trace or a file is wrong.
    """

    words: ClassVar = {"num_steps": "--steps", "engine": "--for", "expert_flops_per_token": "--expert-flops"}

    trace: Annotated[str, Argument(help="A trace (.npz), a load in any format, or synthetic:MODEL.")]
    policy: Annotated[
        list[str] | None, Option("--policy", "-p", help=_POLICY_HELP, autocompletion=completed(_POLICIES))
    ] = None
    model: Annotated[
        str | None,
        Option(help="Sizes of experts and rows. Default: detected from the trace.", autocompletion=completed(MODELS)),
    ] = None
    ranks: Annotated[int, Option(min=1, help="Expert-parallel ranks; each owns tokens and slots.")] = 32
    tokens_per_rank: Annotated[int, Option(min=1, help="Tokens of every rank in every step.")] = 128
    chunk: Annotated[
        int | None, Option(min=1, help="Those that follow each other in a request; 1 is decode. Default: all.")
    ] = None
    top_k: Annotated[int | None, Option(min=1, help="Experts per token, if the trace does not say.")] = None
    steps: Annotated[int | None, Option(min=1, help="Default: once through the tokens; 100 for loads alone.")] = None
    mix: Annotated[
        int | None,
        Option(min=1, help="Windows of a load that a step sums, where one holds less than a step, a request."),
    ] = None
    slots: Annotated[int | None, Option(min=1, help="Total slots. Default: one a rank more than experts need.")] = None
    refresh: Annotated[
        str,
        Option(
            help="Steps between plans; auto: the engine's interval, else what pays on the warm-up, else --horizon.",
            metavar="STEPS|auto",
        ),
    ] = "auto"
    window: Annotated[
        int | None,
        Option(min=1, help="Past steps a plan is made from. Default: --refresh, or a third of the steps, to 1000."),
    ] = None
    horizon: Annotated[
        int | None,
        Option(
            min=1,
            help="Steps that a first plan serves, which share its copies. Default: the engine's interval, or 3000.",
        ),
    ] = None
    copy_overlap: Annotated[
        bool,
        Option(
            "--copy-overlap/--no-copy-overlap",
            help="Experts are copied beside the steps, as vLLM does; or between them, which wait.",
        ),
    ] = True
    hidden: Annotated[int | None, Option(min=1, help="Numbers in a row, of 2 bytes each. Default: the model's.")] = None
    expert_flops: Annotated[float | None, Option(help="FLOP of one expert per row. Default: the model's.")] = None
    expert_bytes: Annotated[float | None, Option(help="Weights of one expert. Default: the model's.")] = None
    copy_bytes: Annotated[float | None, Option(help="Bytes that one copied expert sends. Default: its weights.")] = None
    dispatch_row_bytes: Annotated[float | None, Option(help="Bytes of a row to an expert.")] = None
    combine_row_bytes: Annotated[float | None, Option(help="Bytes of a row back.")] = None
    gpu: Annotated[
        str,
        Option(
            help="Whose kernels and links are modeled: a name, or cpu, which is measured.", autocompletion=complete_gpu
        ),
    ] = "H100"
    phase: Annotated[
        str,
        Option(help="Whose kernels: decode or prefill.", autocompletion=completed(("decode", "prefill"))),
    ] = "decode"
    flops_per_s: Annotated[float | None, Option(help="FLOP/s a rank achieves. Default: --gpu's, as all below.")] = None
    memory_bytes_per_s: Annotated[float | None, Option(help="Reading weights, bytes/s.")] = None
    within_bytes_per_s: Annotated[float | None, Option(help="A rank's link inside its node.")] = None
    between_bytes_per_s: Annotated[float | None, Option(help="A rank's link to other nodes.")] = None
    latency_us: Annotated[float | None, Option(help="Of one exchange, microseconds.")] = None
    start_us: Annotated[float | None, Option(help="Of a call of the expert kernels, microseconds.")] = None
    slot_us: Annotated[float | None, Option(help="Of a rank's slots^0.8, microseconds.")] = None
    floor_us: Annotated[float | None, Option(help="What the expert kernels take at least, microseconds.")] = None
    token_us: Annotated[float | None, Option(help="Of a row besides its arithmetic, microseconds.")] = None
    norm: Annotated[float | None, Option(help="1 adds reading and computing; the larger, the more they overlap.")] = (
        None
    )
    tile: Annotated[int | None, Option(min=1, help="Rows that an expert's are padded to.")] = None
    row_per_expert: Annotated[bool, Option("--row-per-expert", help="Times of a row per expert, not per rank.")] = False
    out: Annotated[Path | None, out_option("Write everything, for `evenmoe report`.")] = None
    report: Annotated[Path | None, Option(help="Write the HTML page at once.")] = None
    details: Annotated[bool, Option("--details", help="Keep every rank's load in every step and layer.")] = False
    for_: Annotated[
        str | None, for_option("Compare for an engine: its rule, and its own balancer (policy own) at its interval")
    ] = None
    seed: Annotated[int, Option(min=0, help="Of draws, planners and a synthetic trace.")] = 0
    workers: Annotated[int | None, Option(min=1, help="Threads; no number depends on it. Default: all processors.")] = (
        None
    )

    def run(self) -> int:
        """Replay, write the files that were asked for, and print the tables or the object."""
        from evenmoe.cli.trace_source import digests
        from evenmoe.simulator.batches import Cluster
        from evenmoe.simulator.replay import simulate
        from evenmoe.simulator.store import save_simulation

        engine = find_engine(self.for_)
        num_nodes = self.num_nodes(self.ranks)
        Cluster(self.ranks, num_nodes, self.tokens_per_rank)  # says what cannot be before anything is read
        self._check_outputs()
        trace, contents = self._open_trace()
        if self.mix is not None:
            from evenmoe.traces.mixing import mix_windows

            trace = mix_windows(trace, self.mix, self.seed)
        model = shape_of(trace, self.model)
        top_k = self.top_k
        if top_k is None and trace.routing is None and "top_k" not in trace.metadata and model is not None:
            top_k = model.top_k
        costs = self._cost_model(model)
        with progress_bar("replaying") as progress:
            simulation = simulate(
                trace,
                self.policy or None,
                num_ranks=self.ranks,
                num_nodes=num_nodes,
                tokens_per_rank=self.tokens_per_rank,
                costs=costs,
                num_slots=self.slots,
                num_groups=self.groups,
                num_steps=self.steps,
                refresh=self._refresh(),
                window=self.window,
                horizon=self.horizon,
                engine=engine,
                copy_overlap=self.copy_overlap,
                chunk=self.chunk,
                top_k=top_k,
                seed=self.seed,
                workers=self.workers,
                details=self.details,
                progress=progress,
            )
        if contents is not None:
            simulation = replace(
                simulation,
                notes=(*simulation.notes, *contents.notes),
                empty_windows=simulation.empty_windows + contents.empty_windows,
            )
        files, called = digests(self.trace, self.policy or ()), shlex.join(["evenmoe", *sys.argv[1:]])
        origin = [("command", called, ""), ("model", "not known" if model is None else model.name, "")]
        origin += [(f"SHA-256 of {path}", digest, "") for path, digest in files.items()]
        simulation = replace(simulation, settings=(*origin, *simulation.settings))
        if self.out is not None:
            save_simulation(simulation, self.out)
        if self.report is not None:
            from evenmoe.report import write_report

            write_report(simulation, self.report, called, files)
        if self.json:
            print_json(simulation.summary.as_json())
        else:
            _print(simulation.summary)
        return 0

    def _refresh(self) -> int | None:
        if self.refresh == "auto":
            return None
        if not self.refresh.isascii() or not self.refresh.isdigit() or not 1 <= int(self.refresh) < 1 << 31:
            raise ConstraintError("--refresh", self.refresh, "must be a number of steps or auto", "use 1 or more")
        return int(self.refresh)

    def _check_outputs(self) -> None:
        """Raise where the trace would be overwritten, or one file by the other, before any time is spent."""
        seen: dict[Path, str] = {}
        for name, path in (("--out", self.out), ("--report", self.report)):
            if path is None:
                continue
            check_no_stream(name, path)
            if not path.resolve().parent.is_dir():
                raise ConstraintError(name, path, "must be in a folder that exists", "make the folder first")
            if path.exists() and Path(self.trace).exists() and path.samefile(self.trace):  # a hard link, too
                raise ConstraintError(name, path, "must not be the trace", "name another file")
            if path.resolve() in seen:
                raise ConstraintError(name, path, f"must not be {seen[path.resolve()]}", "name another file")
            seen[path.resolve()] = f"the file of {name}"

    def _open_trace(self) -> tuple[Trace, Contents | None]:
        from evenmoe.cli.trace_source import SYNTHETIC, read_trace, synthetic_trace

        if not self.trace.startswith(SYNTHETIC):
            return read_trace(self.trace, self)
        for flag, value in self.given_of_file():
            raise ConstraintError(
                flag, value, "must come with a file", "leave it out: a synthetic trace is read from none"
            )
        tokens = self.ranks * self.tokens_per_rank
        streams = max(1, tokens // (self.chunk or self.tokens_per_rank))
        return synthetic_trace(self.trace.removeprefix(SYNTHETIC), tokens, streams, self.steps, self.seed), None

    def _cost_model(self, model: ModelShape | None) -> CostModel:
        from evenmoe.simulator.costs import CostModel

        flops, size, hidden = self.expert_flops, self.expert_bytes, self.hidden
        if model is not None:
            flops = model.expert_flops_per_token if flops is None else flops
            size = model.expert_bytes if size is None else size
            hidden = hidden or model.hidden
        figures = {name: getattr(self, name) for name in _FIGURES if getattr(self, name) is not None}
        missing = [flag for flag, value in (("--expert-flops", flops), ("--expert-bytes", size)) if value is None]
        if hidden is None and not {"dispatch_row_bytes", "combine_row_bytes"} <= figures.keys():
            missing.append("--hidden")
        if flops is None or size is None or missing:
            raise MissingArgumentError(
                "--model",
                "not given, and the trace is of no known model",
                "must name one of them, for the sizes of experts and rows",
                f"use --model with one of {', '.join(MODELS)}; or give {', '.join(missing)}, "
                "and --top-k unless the trace has tokens",
            )
        figures["one_row_per_rank"] = not self.row_per_expert
        phase: Phase = self.phase  # pyright: ignore[reportAssignmentType]  # for_expert says what is wrong with it
        return CostModel.for_expert(hidden or 0, size, flops, self.gpu, phase, **figures)


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on standard error, if that is a terminal; call it with steps done and steps in all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


def _print(summary: Summary) -> None:
    """Two tables, because one would not fit 80 columns: what a policy gains, and what it costs."""
    from rich.console import Console

    from evenmoe.quantities import counted

    print(
        f"{summary.trace}: {counted(summary.num_steps, 'step')} of {counted(summary.tokens_per_step, 'token')} "
        f"on {counted(summary.num_ranks, 'rank')}, {counted(summary.num_nodes, 'node')}"
        + (f"; {summary.num_empty_windows:,} empty windows left out" if summary.num_empty_windows else "")
    )
    console = Console()
    print_headline(summary, console)
    console.print(summary_table(summary, _GAINS))
    console.print(summary_table(summary, _PRICES))
    print_unable(summary, console)
    notes = Console(stderr=True)
    for note in summary.notes:
        notes.print(note, style="dim", markup=False, highlight=False)


command = make_command("simulate", SimulateCommand)
