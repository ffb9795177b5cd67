"""Memory shared by processes: handed over, given back, and refused with a reason on all ranks alike."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenmoe.transport import segment
from evenmoe.transport.segment import share_memory, wait_for_change, wake
from tests.transport.soak import segments


class Meeting:
    """Gathers values of ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.values: list[dict[str, object]] = [{}] * size
        self.barrier = threading.Barrier(size, timeout=30.0)

    def gather(self, rank: int, value: dict[str, object]) -> list[dict[str, object]]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def share(size: int, change: Any = lambda rank, value: value) -> list:
    meeting, results = Meeting(size), [None] * size

    def join(rank: int) -> None:
        results[rank] = share_memory(rank, size, lambda value: meeting.gather(rank, change(rank, value)))

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return results


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("evenmoe")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_see_the_same_memory_and_give_it_back(size):
    files, mapped, shm = open_files(), maps(), segments()
    results = share(size)
    assert {reason for _, reason in results} == {""}
    memories = [memory for memory, _ in results]
    assert len({len(memory) for memory in memories}) == 1
    assert len(memories[0]) % (size * 4096) == 0
    memories[0][-1] = 7
    memories[-1][5] = 9
    assert [memory[[5, -1]].tolist() for memory in memories] == [[9, 7]] * size
    assert segments() == shm  # nothing has a name there, so nothing can be left
    del memories, results
    assert (open_files(), maps()) == (files, mapped)


def on_rank(guilty: int, **fields: object) -> Any:
    return lambda rank, value: {**value, **(fields if rank == guilty and fields.keys() <= value.keys() else {})}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (on_rank(1, host="elsewhere"), "the ranks of the group are on several hosts"),
        (on_rank(2, obstacle="this needs Linux"), "this needs Linux on rank 2"),
        (on_rank(0, failure="it could not be made (no)"), "it could not be made (no) on rank 0"),
    ],
)
def test_one_reason_for_all(change, reason):
    assert share(3, change) == [(None, reason)] * 3


def test_memory_that_cannot_be_made(monkeypatch):
    def refuse(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    files = open_files()
    monkeypatch.setattr(os, "memfd_create", refuse)
    reason = "it could not be made ([Errno 28] No space left on device) on rank 0"
    assert share(2) == [(None, reason)] * 2
    assert open_files() == files


def test_memory_that_cannot_be_mapped(monkeypatch):
    map_it, calls = segment._mapped, []

    def refuse(file: int) -> np.ndarray:
        calls.append(file)
        if len(calls) == 2:  # not rank 0's
            raise OSError(12, "Cannot allocate memory")
        return map_it(file)

    files = open_files()
    monkeypatch.setattr(segment, "_mapped", refuse)
    reason = "it could not be handed over ([Errno 12] Cannot allocate memory) on rank 1"
    assert share(2) == [(None, reason)] * 2
    assert open_files() == files


@pytest.mark.parametrize("futex", [True, False])
def test_a_change_wakes(monkeypatch, futex):
    if not futex:
        monkeypatch.setattr(segment, "_FUTEX", None)
    word = np.zeros(1, np.int32)
    wait_for_change(word.ctypes.data, 1, 30.0)  # it is not 1, so this returns at once
    events = []

    def change() -> None:
        time.sleep(0.05)
        events.append("changed")
        word[0] = 1
        wake(word.ctypes.data)

    thread = threading.Thread(target=change)
    thread.start()
    while word[0] == 0:
        wait_for_change(word.ctypes.data, 0, 30.0)
    events.append("woken")
    thread.join()
    assert events == ["changed", "woken"]
