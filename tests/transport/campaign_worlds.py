"""Worlds of the fault campaign: ranks that perform episodes, as processes or as threads of one process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.transport.world import Rank
from tests.transport.campaign_batches import Member
from tests.transport.campaign_episodes import Episode, Outcome, Performer

START_S = 60.0  # patience with processes that open their world
OPERATORS = (
    "between calls",
    "ExpertParallel.dispatch",
    "ExpertParallel.combine",
    "dispatch",
    "combine",
    "combine_add_rms_norm",
    "dispatch tp=2",
    "combine tp=2",
    "combine_add_rms_norm tp=2",
)


class World:
    """Ranks that wait for episodes.

    Args:
        size: ranks, those of tensor parallelism included. tp_size: 1 or 2.
        threads: the ranks are threads of one process; else each is a process.
        store: "file", or "tcp" with rank 0 as its host.
        timeout_s: of the world.
        prepare: called in every process before the world opens, with its index (0 for threads).
        transport: by which processes exchange.
    """

    def __init__(
        self,
        size: int,
        tp_size: int,
        threads: bool,
        store: str,
        timeout_s: float,
        prepare: Callable[[], object] = lambda: None,
        transport: str = "process_group",
    ) -> None:
        self.size, self.tp_size, self.threads, self.store, self.timeout_s = size, tp_size, threads, store, timeout_s
        self.transport = transport
        self.directory = Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("fork")
        import_module("torch._dynamo")  # the first call of an operator imports it; once here, not in every child
        self._notes = context.RawArray("q", 2 * size)  # per rank: operator being called, calls so far
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        theirs = [their for _, their in pipes]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.processes: list[Any] = []
        for index in range(1 if threads else size):
            work = self._host_threads if threads else self._be_process
            process = context.Process(target=work, args=(index, theirs, prepare), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of fork in a process with threads; the children use none of them.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            self.processes.append(process)
        for their in theirs:
            their.close()
        ready = self.answers(START_S)
        assert ready == [[]] * size, f"the world did not open: {ready}, {self.last_words()}"

    def ask(self, episode: Episode) -> None:
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send(episode)

    def answers(self, patience_s: float) -> list[list[Outcome] | None]:
        """In rank order; None for a rank that has ended, or gives no answer within `patience_s`."""
        deadline = time.monotonic() + patience_s
        found: list[list[Outcome] | None] = [None] * self.size
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait_for_any(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                with suppress(EOFError, ConnectionResetError):
                    found[rank] = pipe.recv()
        return found

    def calls(self) -> int:
        """Calls that the rank with the fewest has made or begun."""
        return min(self._notes[1::2])

    def position(self, rank: int) -> str:
        """The operator that a rank is in, or was in when it ended."""
        return OPERATORS[self._notes[2 * rank]]

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def exit_status(self, rank: int) -> int | None:
        """Of a process that has ended; a negative number is a signal's."""
        process = self.processes[0 if self.threads else rank]
        process.join(0.2)
        return process.exitcode

    def last_words(self) -> str:
        """What the processes wrote to stderr, the end of it."""
        texts = [path.read_text(errors="replace") for path in sorted(self.directory.glob("stderr*"))]
        return "\n".join(text[-1500:] for text in texts if text)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- in the children ----------------------------------------------------------------------------------------------

    def _be_process(self, index: int, pipes: list[Connection], prepare: Callable[[], object]) -> None:
        self._start(index, pipes, {index}, prepare)
        if self.store == "tcp":
            store = dist.TCPStore("127.0.0.1", self._port, self.size, index == 0, timedelta(seconds=START_S))
        else:
            store = dist.FileStore(str(self.directory / "store"), self.size)
        timeout = timedelta(seconds=START_S)
        dist.init_process_group("gloo", store=store, rank=index, world_size=self.size, timeout=timeout)
        sizes = self.size // self.tp_size, self.tp_size
        rank = em.process_world(*sizes, timeout_s=self.timeout_s, transport=self.transport)
        with suppress(KeyboardInterrupt):  # outside a call: a program that ends
            self._serve(rank, pipes[index])
        os._exit(130)

    def _host_threads(self, index: int, pipes: list[Connection], prepare: Callable[[], object]) -> None:
        self._start(index, pipes, set(range(self.size)), prepare)
        with em.local_world(self.size // self.tp_size, self.tp_size, timeout_s=self.timeout_s) as world:
            world.run(lambda rank: self._serve(rank, pipes[rank.index]))

    def _start(self, index: int, pipes: list[Connection], mine: set[int], prepare: Callable[[], object]) -> None:
        torch.set_num_threads(1)  # first of all: the parent's thread pool does not exist here
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the campaign was started with
        # A copy of a pipe's end in another process would keep the parent from seeing that this one has ended.
        for other, (pipe, ours) in enumerate(zip(pipes, self._pipes, strict=True)):
            ours.close()
            if other not in mine:
                pipe.close()
        with (self.directory / f"stderr{index}").open("wb") as words:
            os.dup2(words.fileno(), 2)
        faulthandler.disable()  # pytest's writes to a stderr of its own
        prepare()

    def _serve(self, rank: Rank, pipe: Connection) -> None:
        at = 2 * rank.index

        def note(operator: str, calling: bool) -> None:
            self._notes[at] = OPERATORS.index(operator) if calling else 0
            self._notes[at + 1] += calling

        performer = Performer(Member(rank, self.tp_size), note)
        pipe.send([])
        while True:
            pipe.send(performer.perform(pipe.recv()))
