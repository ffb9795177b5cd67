"""Contestants in turn, in one group of processes: each is compared with the dense formula, then timed.

CPU time is that of the whole process of every rank, gloo's threads included; where the ranks are threads of one
process, that of each thread. Wall time is from the first rank's start to the last one's end, of ranks that start
together.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

import evenmoe as em
from benchmarks.exchange.contestants import (
    OTHERS,
    OURS,
    PEERS,
    TRANSPORTS,
    Batch,
    Contestant,
    Work,
    multiplied,
)
from evenmoe.transport.world import Rank
from tests.processes import run_once

WARM_UP = 2  # steps that are not counted: pools of memory and gloo's buffers grow in them
PATIENCE_S, TIMEOUT_S = 500.0, 120.0  # of all steps of one work, and of one exchange


@dataclass(frozen=True)
class Sample:
    """One step of one rank: CPU seconds until its experts had their rows, and after; when it began and ended."""

    dispatch: float
    combine: float
    begin: float
    end: float


@dataclass(frozen=True)
class Figures:
    """What a step of all ranks together costs, in ms: medians over the steps, and the range of the CPU time."""

    dispatch_cpu_ms: float
    combine_cpu_ms: float
    cpu_ms: float
    cpu_ms_least: float
    cpu_ms_most: float
    wall_ms: float


def figures_of(steps: Sequence[Sequence[Sample]]) -> Figures:
    """Median over the steps, of the samples of all ranks in each."""

    def ms(of_step: Callable[[Sequence[Sample]], float]) -> list[float]:
        return [1e3 * of_step(samples) for samples in steps]

    cpu = ms(lambda samples: sum(one.dispatch + one.combine for one in samples))
    return Figures(
        statistics.median(ms(lambda samples: sum(one.dispatch for one in samples))),
        statistics.median(ms(lambda samples: sum(one.combine for one in samples))),
        statistics.median(cpu),
        min(cpu),
        max(cpu),
        statistics.median(ms(lambda samples: max(s.end for s in samples) - min(s.begin for s in samples))),
    )


class Threads:
    """Ranks that are threads of this process, and wait between the jobs that they are given."""

    def __init__(self, ranks: int) -> None:
        self._gate = threading.Barrier(ranks + 1)
        self._job: Callable[[Rank], Any] | None = None
        self._results: dict[int, Any] = {}
        self._ranks = ranks
        self._runner = threading.Thread(target=self._open, daemon=True)
        self._runner.start()

    def run(self, job: Callable[[Rank], Any]) -> list[Any]:
        """`job(rank)` in every thread; the results by rank.

        Raises:
            Exception: what a job raised.
        """
        self._job = job
        self._gate.wait()
        self._gate.wait()
        for result in self._results.values():
            if isinstance(result, Exception):
                raise result
        return [self._results[rank] for rank in sorted(self._results)]

    def close(self) -> None:
        self._job = None
        self._gate.wait()
        self._runner.join()

    def _open(self) -> None:
        with em.local_world(ep_size=self._ranks) as world:
            world.run(self._serve)

    def _serve(self, rank: Rank) -> None:
        while True:
            self._gate.wait()
            if self._job is None:
                return
            try:
                self._results[rank.index] = self._job(rank)
            except Exception as error:
                self._results[rank.index] = error
            self._gate.wait()


def timed(contestant: Contestant, batch: Batch, clock: Callable[[], float]) -> Sample:
    """One step with experts that give back what they are given."""
    marks = []

    def experts(rows: torch.Tensor, ids: Callable[[], torch.Tensor]) -> torch.Tensor:
        marks.append(clock())
        return rows

    begin, before = time.perf_counter(), clock()
    contestant.step(batch, experts)
    after = clock()
    return Sample(marks[0] - before, after - marks[0], begin, time.perf_counter())


def problem(contestant: Contestant, batch: Batch) -> str:
    """What is wrong with a step's result; "" if nothing is.

    All terms of a sum have the sign of x, so that what rounding K products and K sums in float32 changes is at most
    2 K · 2^-24 of the result, and rounding it to bfloat16 once 2^-8 of it (8 bits, and half of the last one's unit is
    2^-8 of a power of two); reduced sums are rounded once more on their way. K is 64 at most.
    """
    found, expected = contestant.step(batch, multiplied).double(), contestant.expected(batch)
    if found.shape != expected.shape:
        return f"gives {tuple(found.shape)}, not {tuple(expected.shape)}"
    wrong = ~((found - expected).abs() <= (contestant.roundings * 2.0**-8 + 2.0**-16) * expected.abs())
    return f"{int(wrong.sum())} of {wrong.numel()} values are wrong" if wrong.any() else ""


class Contest:
    """The contestants of one process, which is rank `index`; rank 0 also has those whose ranks are threads.

    Args:
        names: as `contestants.names` gives them.
    """

    def __init__(self, index: int, work: Work, names: Sequence[str]) -> None:
        self._batch = Batch.of(work, index)
        self._of_thread: dict[str, dict[int, Contestant]] = {}
        self.threads = Threads(work.ranks) if index == 0 and any(name.endswith(", threads") for name in names) else None
        self._batches = [Batch.of(work, rank) for rank in range(work.ranks)] if self.threads else []
        kinds = {kind: em.process_world(work.ranks, transport=kind, timeout_s=TIMEOUT_S) for kind in TRANSPORTS}
        self._made: dict[str, Contestant] = {}
        for name in names:
            who, _, kind = name.partition(", ")
            if kind != "threads":
                make = OURS[who] if kind else OTHERS[who]
                self._made[name] = make(kinds[kind or "process_group"], work)
            elif self.threads:
                made = self.threads.run(lambda rank, who=who: OURS[who](rank, work))
                self._of_thread[name] = dict(enumerate(made))

    def samples(self, name: str) -> list[Sample]:
        """One step of a contestant, of the ranks that are in this process."""
        made = self._made.get(name)
        if made:
            return [timed(made, self._batch, time.process_time)]
        return self._in_threads(name, lambda made, batch: timed(made, batch, time.thread_time))

    def problems(self, name: str) -> list[str]:
        """What is wrong with a contestant's results on all ranks; a collective, so that all of them stop."""
        made = self._made.get(name)
        found = [problem(made, self._batch)] if made else self._in_threads(name, problem)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        return [f"{name}, rank {rank}: {text}" for rank, texts in enumerate(gathered) for text in texts if text]

    def _in_threads(self, name: str, job: Callable[[Contestant, Batch], Any]) -> list[Any]:
        if self.threads is None:
            return []
        made = self._of_thread[name]
        return self.threads.run(lambda rank: job(made[rank.index], self._batches[rank.index]))


def prepare(names: Sequence[str]) -> None:
    """Import and compile here, once, what the processes that are forked from this one need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads would not be there in a forked process
    work = Work(2, 8, 2, top_k=1, ranks=1)
    with em.local_world(ep_size=1) as world:
        for make in OURS.values():
            world.run(lambda rank, make=make: make(rank, work).step(Batch.of(work, 0), multiplied))
    torch.set_num_threads(threads)
    if PEERS["transformers"] in names:
        import_module("transformers.distributed.expert_parallel")


def contest(
    index: int, store: str, work: Work, names: Sequence[str], steps: int
) -> dict[str, list[list[Sample]]] | list[str]:
    """One process's samples, by contestant and step; or what is wrong with the results."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=work.ranks)
    with torch.no_grad():
        here = Contest(index, work, names)
        for name in names:
            if wrong := here.problems(name):
                return wrong
        found: dict[str, list[list[Sample]]] = {name: [] for name in names}
        for step in range(WARM_UP + steps):
            first = step % len(names)  # nobody always follows the same one, whose rows the caches hold
            for name in [*names[first:], *names[:first]]:
                dist.barrier()
                samples = here.samples(name)
                if step >= WARM_UP:
                    found[name].append(samples)
        dist.barrier()
        if here.threads:
            here.threads.close()
    dist.destroy_process_group()
    return found


def measure(work: Work, names: Sequence[str], steps: int) -> dict[str, Figures]:
    """The figures of each contestant.

    Raises:
        AssertionError: a result is not that of the dense formula, or a process failed.
    """
    prepare(names)
    with tempfile.TemporaryDirectory() as folder:
        results = run_once(work.ranks, contest, f"{folder}/store", work, names, steps, patience_s=PATIENCE_S)
    for result in results:
        assert isinstance(result, dict), f"{work.name}: {result!r}"
    return {
        name: figures_of([[one for result in results for one in result[name][step]] for step in range(steps)])
        for name in names
    }
