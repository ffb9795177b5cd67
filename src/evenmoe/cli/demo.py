"""`evenmoe demo`: plan for a trace, run the chain on two worlds, compare with the dense model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import evenmoe as em
from evenmoe.cli.chain import Comparison, Layer, compare, expect, make_layer, run_chain, with_placement
from evenmoe.cli.ranks import finish, is_first_process, num_processes
from evenmoe.cli.streams import print_json
from evenmoe.errors import ConstraintError
from evenmoe.placement import default_placement
from evenmoe.traces.synthesis import small_trace
from evenmoe.traces.trace import Trace, load_trace

#: The published demo's world: 8 × 2 ranks, 8 tokens each, hidden 7168, 3 experts per token, one expert per rank.
PAGE_EP, PAGE_TP, PAGE_TOKENS, PAGE_HIDDEN, PAGE_TOP_K = 8, 2, 8, 7168, 3
PAGE_INNER = 512
TRACE_TOKENS, TRACE_HIDDEN, TRACE_INNER = 64, 1024, 256  # per rank; a trace does not say how wide its model is
DEFAULT_TOP_K = 4  # for a trace without `routing`


@dataclass(frozen=True)
class Step:
    """One world that was run."""

    title: str
    comparison: Comparison
    seconds: float


def run_demo(path: Path | None, ranks: int, seed: int, *, as_json: bool) -> bool:
    """Print what the command promises; True when every difference is explained by rounding."""
    # One thread: on a busy machine two that wait for each other take ten times as long, on an idle one half as long.
    torch.set_num_threads(1)
    console = Console(stderr=True, quiet=as_json or not is_first_process())
    trace = small_trace(seed) if path is None else load_trace(path)
    processes = num_processes()
    ranks = _fitting_ranks(trace, processes or ranks, exact=bool(processes))
    with _progress(console, "planning"):
        identity, placement = _placements(trace, ranks, seed)
    total = trace.load.sum(axis=0)
    before, after = (em.peak_to_average(total, p) for p in (identity, placement))
    steps = []
    expected = None
    for title, layer in _worlds(trace, identity, placement, int(before.argmax()), processes, seed):
        start = time.perf_counter()
        with _progress(console, f"{title}: the chain"):
            results = run_chain(layer)
        if not is_first_process():
            continue
        if expected is None or expected[0] is not layer.x:
            with _progress(console, f"{title}: the dense model"):
                expected = layer.x, expect(layer)
        steps.append(Step(title, compare(layer, results, expected[1]), time.perf_counter() - start))
    good = all(step.comparison.largest_share <= 1.0 for step in steps)
    if steps:
        summary = _summary(trace, placement, before, after, steps, good)
        if as_json:
            print_json(summary)
        else:
            _print(summary, steps)
    finish()
    return good


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


def _placements(trace: Trace, ranks: int, seed: int) -> tuple[em.Placement, em.Placement]:
    """As the model is loaded without balancing, and planned for one more slot per rank."""
    identity = default_placement(trace.num_layers, trace.num_experts, ranks)
    load = trace.load.sum(axis=0)
    return identity, em.plan(load, num_ranks=ranks, num_slots=trace.num_experts + ranks, seed=seed)


def _worlds(
    trace: Trace, identity: em.Placement, placement: em.Placement, layer: int, processes: int, seed: int
) -> Iterator[tuple[str, Layer]]:
    """The published demo's world, then the trace's most unbalanced layer before and after planning."""
    tp = PAGE_TP if not processes or (processes >= 4 and processes % 2 == 0) else 1
    ep = processes // tp if processes else PAGE_EP
    generator = torch.Generator().manual_seed(seed)
    top_k = min(PAGE_TOP_K, ep)
    picks = torch.rand((ep * tp, PAGE_TOKENS, ep), generator=generator).argsort(dim=-1)[..., :top_k]
    page = default_placement(1, ep, ep)
    title = f"published demo's world: {ep} EP x {tp} TP ranks, {PAGE_TOKENS} tokens each, H {PAGE_HIDDEN}, K {top_k}"
    yield title, make_layer(page, 0, picks, tp, PAGE_HIDDEN, PAGE_INNER, seed)
    ids = _tokens(trace, layer, identity.num_ranks, seed)
    world = f"{trace.num_experts} experts, K {ids.shape[-1]}, {identity.num_ranks} ranks, layer {layer}"
    loaded = make_layer(identity, layer, ids, 1, TRACE_HIDDEN, TRACE_INNER, seed)
    yield f"{world}, as loaded", loaded
    yield f"{world}, planned", with_placement(loaded, placement, layer)


def _tokens(trace: Trace, layer: int, ranks: int, seed: int) -> torch.Tensor:
    """int64 (ranks, tokens, K): recorded tokens of the layer where there are any, else drawn from its load."""
    rng = np.random.default_rng(seed)
    if trace.routing is not None:
        # With replacement, so that a trace of a few tokens will do as well.
        picked = rng.integers(0, len(trace.routing), (ranks, TRACE_TOKENS))
        return torch.from_numpy(trace.routing[picked, layer])
    top_k = min(DEFAULT_TOP_K, trace.num_experts)
    # Top-k of log-weights plus Gumbel noise draws distinct experts in proportion to their load.
    weight = np.log(trace.load[:, layer].sum(axis=0) + 1.0)
    noise = rng.gumbel(size=(ranks, TRACE_TOKENS, trace.num_experts))
    return torch.from_numpy(np.argsort(-(weight + noise), axis=-1)[..., :top_k].copy())


def _summary(
    trace: Trace, placement: em.Placement, before: np.ndarray, after: np.ndarray, steps: list[Step], good: bool
) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "ranks": placement.num_ranks,
        "slots": placement.num_slots,
        "tokens": int(trace.load.sum()) // trace.num_layers,
        "peak_to_average_identity": {"mean": float(before.mean()), "worst": float(before.max())},
        "peak_to_average_plan": {"mean": float(after.mean()), "worst": float(after.max())},
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


def _print(summary: dict[str, Any], steps: list[Step]) -> None:
    console = Console()
    console.print(
        f"{summary['trace']}: {summary['layers']} layers, {summary['experts']} experts, "
        f"{summary['tokens']:,} expert picks per layer; {summary['ranks']} ranks",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("placement", "slots", "mean of layers", "worst layer", title="peak-to-average load (1.0 is perfect)")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, slots, key in (
        ("as loaded", summary["experts"], "peak_to_average_identity"),
        ("planned", summary["slots"], "peak_to_average_plan"),
    ):
        table.add_row(name, str(slots), f"{summary[key]['mean']:.3f}", f"{summary[key]['worst']:.3f}")
    console.print(table)
    for step in steps:
        result = step.comparison
        rows = np.array(result.rows_per_rank)
        console.print(
            f"{step.title}\n"
            f"  busiest rank {rows.max():,} of {rows.sum():,} rows ({rows.max() / rows.mean():.2f} x mean)\n"
            f"  {result.num_values:,} values against the dense model: largest difference "
            f"{result.largest_difference:.3g}, {result.largest_share:.0%} of what rounding can explain "
            f"({step.seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
    console.print("the chain equals the dense model" if summary["within_rounding"] else "THE CHAIN IS WRONG")


@contextmanager
def _progress(console: Console, title: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    with console.status(f"{title} …"):
        yield
