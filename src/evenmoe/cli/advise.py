"""`evenmoe advise`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import FileOptions, completed, make_command, numbers_of, print_json, table_console
from evenmoe.cli.simulate import complete_gpu
from evenmoe.engines import ENGINES
from evenmoe.traces.models import MODELS

if TYPE_CHECKING:
    from evenmoe.advice import Advice


@dataclass(frozen=True, kw_only=True)
class AdviseCommand(FileOptions):
    """Say whether balancing pays: on this traffic, this accelerator, in which phase, with how many slots.

    Plans on the first part of the recording, and judges on the last by the modeled time of the MoE layers, without
    and with balancing, under the engine's own rule and under evenmoe's. It pays where the gain is certain at 1 % over
    all trials and at least 3 %. Exit codes: 0 done, whatever the verdict; 2 a file or an option is wrong.
    """

    words: ClassVar = {"num_ranks": "--ranks", "num_nodes": "--nodes", "batch_sizes": "--tokens"}

    source: Annotated[str, Argument(help="Load or trace in any format, a folder, or `-` for standard input.")]
    engine: Annotated[
        str,
        Option("--engine", "--for", help=f"Who serves: {', '.join(ENGINES)}.", autocompletion=completed(ENGINES)),
    ]
    ranks: Annotated[int, Option(min=1, help="Expert-parallel ranks.")]
    gpu: Annotated[
        str, Option(help="Accelerator of a rank, or cpu, which is measured.", autocompletion=complete_gpu)
    ] = "H100"
    nodes: Annotated[int | None, Option(min=1, help="Default: as many as the accelerator's usual nodes take.")] = None
    model: Annotated[
        str | None,
        Option(help="Sizes of experts and rows. Default: detected from the trace.", autocompletion=completed(MODELS)),
    ] = None
    top_k: Annotated[int | None, Option(min=1, help="Experts per token, if neither trace nor model says.")] = None
    tokens: Annotated[
        str | None, Option(help="Tokens of a step, over all ranks. Default: 16,64,256,1024,4096,16384.")
    ] = None
    phase: Annotated[
        str | None,
        Option(help="decode or prefill alone.", autocompletion=completed(("decode", "prefill"))),
    ] = None
    seed: Annotated[int, Option(min=0, help="Of draws and planners.")] = 0

    def run(self) -> int:
        """Advise, and print the table and the sentence, or the object."""
        from evenmoe.advice import advise
        from evenmoe.advice.advise import BATCH_SIZES
        from evenmoe.advice.words import as_json, sentence
        from evenmoe.cli.trace_source import read_trace

        trace, _ = read_trace(self.source, self)
        found = advise(
            trace,
            engine=self.engine,
            gpu=self.gpu,
            num_ranks=self.ranks,
            num_nodes=self.nodes,
            model=self.model,
            top_k=self.top_k,
            batch_sizes=BATCH_SIZES if self.tokens is None else numbers_of("--tokens", self.tokens),
            phases=("decode", "prefill") if self.phase is None else (self.phase,),  # pyright: ignore
            seed=self.seed,
        )
        if self.json:
            print_json(as_json(found, self.source))
            return 0
        _print_table(found)
        print(f"{found.held_out.words}; kernels {found.basis}: {found.source}")
        print(sentence(found, self.source))
        return 0


def _print_table(found: Advice) -> None:
    """The best trial that the engine can run of each phase and size, and the best of evenmoe's own rule."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("phase", "tokens", "slots", "rule", "without µs", "with µs", "gain", "at least", "paid after"):
        table.add_column(name, justify="left" if name in ("phase", "rule") else "right")
    for phase, tokens in dict.fromkeys((trial.phase, trial.tokens) for trial in found.trials):
        here = [trial for trial in found.trials if (trial.phase, trial.tokens) == (phase, tokens)]
        shown = [max(kind, key=lambda trial: trial.gain.percent) for kind in (
            [trial for trial in here if trial.runs], [trial for trial in here if not trial.runs]
        ) if kind]  # fmt: skip
        for trial in shown:
            paid = trial.break_even_steps
            table.add_row(
                phase, f"{tokens:,}", str(trial.num_slots),
                trial.rule + ("" if trial.runs else ", evenmoe's own"), f"{trial.before_us:,.0f}",
                f"{trial.after_us:,.0f}", f"{trial.gain.percent:.1f} %", f"{trial.gain.lower:.1f} %",
                "never" if paid == float("inf") else f"{paid:,.0f} steps",
            )  # fmt: skip
    table_console(sys.stdout).print(table)


command = make_command("advise", AdviseCommand)
