"""Real processes for tests: made by fork, joined by gloo, kept for many jobs."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import evenmoe as em

TRANSPORTS = ("process_group", "shared_memory")  # by which processes of one host exchange


class Processes:
    """Processes that wait for jobs: `run(world, job, *arguments)` calls `job(rank, *arguments)` in each.

    Every world is there over each of `TRANSPORTS`.

    Args:
        count: processes.
        worlds: (ep_size, tp_size) of the worlds that they open, each over all of them.
        timeout_s: of their exchanges.

    Jobs are functions of modules that the parent has imported before the first job, since a child made by fork
    inherits them; arguments and results travel as plain pickles.
    """

    def __init__(self, count: int, worlds: Sequence[tuple[int, int]], timeout_s: float = 60.0) -> None:
        self.count, self.worlds, self.timeout_s = count, list(worlds), timeout_s
        self.children: list[Any] = []
        self._pipes: list[Connection] = []
        self._directory = ""

    def run(
        self,
        world: tuple[int, int],
        job: Callable[..., Any],
        *arguments: Any,
        patience_s: float = 90.0,
        transport: str = "process_group",
    ) -> list:
        """Results in rank order; an exception that a job raised stands in its place. A child that ended gives None.

        Raises:
            AssertionError: no answer within `patience_s`; the processes are ended, and started anew by the next run.
        """
        if not self.children:
            self._start()
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps(((*world, transport), job, arguments)))
        deadline = time.monotonic() + patience_s
        results = []
        for index, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.stop(patience_s=0.0)
                raise AssertionError(f"process {index} gave no answer within {patience_s} s")
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                results.append(None)
        return results

    def stop(self, patience_s: float = 5.0) -> None:
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps(None))
        for child in self.children:
            child.join(patience_s)
            if child.is_alive():
                child.kill()
                child.join()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self.children, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        import_module("torch._dynamo")  # the first call of an operator imports it; once here, not in every child
        self._directory = tempfile.mkdtemp()
        for index in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (index, self.count, self.worlds, self.timeout_s, str(Path(self._directory) / "store"), theirs)
            child = context.Process(target=_serve, args=arguments, daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of fork in a process with threads; the children use none of them.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            theirs.close()
            self.children.append(child)
            self._pipes.append(ours)


def run_once(count: int, job: Callable[..., Any], *arguments: Any, patience_s: float = 60.0) -> list:
    """`job(index, *arguments)` in as many new processes; results in order, None for one that ended without a result.

    Raises:
        AssertionError: a process is still there after `patience_s`; it is ended.
    """
    context = multiprocessing.get_context("fork")
    children, pipes = [], []
    for index in range(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_run_job, args=(theirs, job, index, arguments), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        theirs.close()
        children.append(child)
        pipes.append(ours)
    deadline, results, late = time.monotonic() + patience_s, [], []
    for index, (child, pipe) in enumerate(zip(children, pipes, strict=True)):
        result = None
        with suppress(EOFError):
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                result = pickle.loads(pipe.recv_bytes())
            else:
                late.append(index)
        results.append(result)
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            late.append(index)
            child.kill()
            child.join()
        pipe.close()
    assert not late, f"processes {sorted(set(late))} did not end within {patience_s} s"
    return results


def _run_job(pipe: Connection, job: Callable[..., Any], index: int, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    try:
        result = job(index, *arguments)
    except Exception as error:
        result = error
    pipe.send_bytes(pickle.dumps(result))


def _serve(
    index: int, count: int, worlds: Sequence[tuple[int, int]], timeout_s: float, store_path: str, pipe: Connection
) -> None:
    torch.set_num_threads(1)  # first of all: the parent's thread pool does not exist here
    timeout = timedelta(seconds=60.0)
    store = dist.FileStore(store_path, count)
    dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=timeout)
    ranks = {
        (*shape, transport): em.process_world(*shape, timeout_s=timeout_s, transport=transport)
        for shape in worlds
        for transport in TRANSPORTS
    }
    while (message := pickle.loads(pipe.recv_bytes())) is not None:
        world, job, arguments = message
        try:
            result = job(ranks[world], *arguments)
        except Exception as error:
            result = error
        pipe.send_bytes(pickle.dumps(result))
