"""`evenmoe demo`: plan for a trace, run the chain on two worlds, compare with the dense model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from evenmoe.cli.options import FileOptions, make_command, print_json
from evenmoe.errors import ConstraintError
from evenmoe.quantities import par

if TYPE_CHECKING:
    from rich.console import Console

    import evenmoe as em
    from evenmoe.cli.chain import Comparison
    from evenmoe.metrics import FloatArray
    from evenmoe.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class DemoCommand(FileOptions):
    """Run the whole chain on this machine and compare it with a dense model.

    Plans a placement for the trace, then runs update_expert, dispatch, real expert matrix products, combine, residual
    and RmsNorm on every rank. Exits with 1 if any value is farther from the dense model than rounding explains.
    Under torchrun the ranks are its processes, otherwise threads.
    """

    trace: Annotated[
        Path | None,
        Option(help="Trace or load to run on, in any format; recorded tokens are run where it has them."),
    ] = None
    ranks: Annotated[int, Option(help="Expert-parallel ranks of the trace's world, as threads.", min=1)] = 8
    seed: Annotated[int, Option(help="Of tokens, weights and the synthetic trace.", min=0)] = 0

    def run(self) -> int:
        """Print what the command promises; 0 when every difference is explained by rounding."""
        if self.trace is None:
            for flag, value in self.given_of_file():
                raise ConstraintError(flag, value, "must come with --trace", "leave it out, or name a file")
        import torch
        from rich.console import Console

        import evenmoe as em
        from evenmoe.cli import chain
        from evenmoe.cli.trace_source import read_trace
        from evenmoe.placement import default_placement
        from evenmoe.traces.synthesis import small_trace

        # One thread: on a busy machine two that wait for each other take ten times as long, on an idle one half as
        # long.
        torch.set_num_threads(1)
        console = Console(stderr=True, quiet=self.json or not chain.is_first_process())
        trace = small_trace(self.seed) if self.trace is None else read_trace(str(self.trace), self)[0]
        processes = chain.num_processes()
        ranks = _fitting_ranks(trace, processes or self.ranks, exact=bool(processes))
        total, num_slots = trace.load.sum(axis=0), trace.num_experts + ranks
        with _progress(console, "planning"):
            identity = default_placement(trace.num_layers, trace.num_experts, ranks)
            placement = em.plan(total, num_ranks=ranks, num_slots=num_slots, seed=self.seed)
        before, after = (em.peak_to_average(total, each) for each in (identity, placement))
        steps: list[_Step] = []
        expected = None
        for title, layer in chain.demo_worlds(trace, identity, placement, int(before.argmax()), processes, self.seed):
            start = time.perf_counter()
            with _progress(console, f"{title}: the chain"):
                results = chain.run_chain(layer)
            if not chain.is_first_process():
                continue
            if expected is None or expected[0] is not layer.x:
                with _progress(console, f"{title}: the dense model"):
                    expected = layer.x, chain.expect(layer)
            comparison = chain.compare(layer, results, expected[1])
            steps.append(_Step(title, comparison, time.perf_counter() - start))
        good = all(step.comparison.largest_share <= 1.0 for step in steps)
        if steps and self.json:
            print_json(_summary(trace, placement, before, after, steps, good))
        elif steps:
            _print(trace, placement, before, after, steps, good)
        chain.finish()
        return 0 if good else 1


@dataclass(frozen=True)
class _Step:
    """One world that was run."""

    title: str
    comparison: Comparison
    seconds: float


def _fitting_ranks(trace: Trace, ranks: int, *, exact: bool) -> int:
    """The identity placement needs ranks that divide the experts: the most that do, up to `ranks`."""
    fitting = max(r for r in range(1, min(ranks, trace.num_experts) + 1) if trace.num_experts % r == 0)
    if exact and fitting != ranks:
        raise ConstraintError(
            "--nproc-per-node",
            ranks,
            f"must divide the {trace.num_experts} experts of {trace.name}",
            f"use {fitting}",
        )
    return fitting


def _summary(
    trace: Trace, placement: em.Placement, before: FloatArray, after: FloatArray, steps: Sequence[_Step], good: bool
) -> dict[str, object]:
    return {
        "trace": trace.name,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "num_ranks": placement.num_ranks,
        "num_slots": placement.num_slots,
        "assignments_per_layer": _assignments(trace),
        "par": {
            name: {"mean": float(values.mean()), "worst": float(values.max())}
            for name, values in (("default_placement", before), ("planned", after))
        },
        "worlds": [
            {
                "world": step.title,
                "values_compared": step.comparison.num_values,
                "largest_difference": step.comparison.largest_difference,
                "largest_difference_over_bound": step.comparison.largest_share,
                "rows_per_rank": step.comparison.rows_per_rank,
                "seconds": round(step.seconds, 3),
            }
            for step in steps
        ],
        "within_rounding": good,
    }


def _print(
    trace: Trace, placement: em.Placement, before: FloatArray, after: FloatArray, steps: Sequence[_Step], good: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{trace.name}: {trace.num_layers} layers, {trace.num_experts} experts, "
        f"{_assignments(trace):,} assignments per layer; {placement.num_ranks} ranks",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("placement", "slots", "mean of layers", "worst layer", title="peak-to-average load (1.0 is perfect)")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, slots, values in (
        ("default placement", trace.num_experts, before),
        ("planned", placement.num_slots, after),
    ):
        table.add_row(name, str(slots), par(values.mean()), par(values.max()))
    console.print(table)
    for step in steps:
        result = step.comparison
        rows = result.rows_per_rank
        console.print(
            f"{step.title}\n"
            f"  busiest rank {max(rows):,} of {sum(rows):,} rows ({max(rows) / (sum(rows) / len(rows)):.2f} x mean)\n"
            f"  {result.num_values:,} values against the dense model: largest difference "
            f"{result.largest_difference:.3g}, {result.largest_share:.0%} of what rounding can explain "
            f"({step.seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
    console.print("the chain equals the dense model" if good else "THE CHAIN IS WRONG")


def _assignments(trace: Trace) -> int:
    """Token–expert assignments per layer."""
    return int(trace.load.sum()) // trace.num_layers


def _progress(console: Console, title: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing elsewhere."""
    return console.status(f"{title} …")


command = make_command("demo", DemoCommand)
