"""Posts between ranks that are threads over one array: what is read is what was posted, in step, and nobody hangs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from evenmoe.compiled import compiled
from evenmoe.transport.posts import TABLE, Posts
from evenmoe.transport.raw_memory import copy_bytes, fence_acquire, float_of_bits, load_acquire, store_release


def of_ranks(world_size: int) -> list[Posts]:
    memory = np.zeros(1 << 20, np.uint8)
    return [Posts(memory, rank, world_size) for rank in range(world_size)]


def in_threads(jobs: list) -> None:
    failures = []

    def watched(job) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=watched, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert not failures, failures


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_rank_reads_what_was_posted_to_it_in_step(world_size):
    """Each post holds its number, and tells where a larger message lies, of which no word may be of another post."""
    steps, everyone = 400, np.arange(world_size)
    messages = np.zeros((world_size, 2, 64), np.int64)

    def job(posts: Posts):
        def run() -> None:
            me = posts.rank
            for step in range(steps):
                messages[me, step % 2] = step
                tables = np.full((world_size, TABLE), step) + np.arange(world_size)[:, None] * 10**6
                posts.post(everyone, tables)
                assert posts.wait_for_posts(everyone, lambda rank: "") == ""
                theirs = posts.tables(everyone)
                assert (theirs == step + 10**6 * me).all()
                assert (messages[:, step % 2] == step).all()
            assert posts.total == steps
            assert posts.next_to(everyone).tolist() == [0 if rank == me else steps + 1 for rank in range(world_size)]

        return run

    in_threads([job(posts) for posts in of_ranks(world_size)])


def test_narrower_groups_are_counted_by_pairs():
    zero, one, two = of_ranks(3)
    pair, everyone = np.array([0, 2]), np.arange(3)
    tables = np.zeros((3, TABLE), np.int64)
    zero.post(pair, tables + 5)
    two.post(pair, tables + 6)
    assert zero.wait_for_posts(pair, lambda rank: "late") == ""
    assert zero.tables(pair)[:, 0].tolist() == [5, 0, 6]
    for posts in (zero, one, two):
        posts.post(everyone, tables + posts.rank)
    for posts in (zero, one, two):
        assert posts.wait_for_posts(everyone, lambda rank: "late") == ""
        assert posts.tables(everyone)[:, 0].tolist() == [0, 1, 2]
    assert [posts.next_to(everyone).tolist() for posts in (zero, one, two)] == [[0, 2, 3], [2, 0, 2], [3, 2, 0]]
    assert zero.next_to(pair).tolist() == [0, 0, 3]


def test_a_wait_ends_when_the_watch_says_so():
    zero, _ = of_ranks(2)
    zero.post(np.arange(2), np.zeros((2, TABLE), np.int64))
    asked = []

    def watch(rank: int) -> str:
        asked.append(rank)
        return "enough" if len(asked) == 3 else ""

    assert zero.wait_for_posts(np.arange(2), watch) == "enough"
    assert asked == [1, 1, 1]


def test_what_was_posted_before_the_end_is_still_read():
    zero, one = of_ranks(2)
    for posts in (zero, one):
        posts.post(np.arange(2), np.full((2, TABLE), 7))
    one.say_gone()
    assert zero.wait_for_posts(np.arange(2), lambda rank: "gone") == ""
    assert zero.gone([0, 1]) == [1]
    zero.post(np.arange(2), np.full((2, TABLE), 8))
    assert zero.wait_for_posts(np.arange(2), lambda rank: "gone" if zero.gone([rank]) else "") == "gone"


def test_readers_are_waited_for():
    zero, one = of_ranks(2)
    everyone, tables = np.arange(2), np.zeros((2, TABLE), np.int64)
    for posts in (zero, one):
        posts.post(everyone, tables)
    due = np.array([0, 1])
    assert zero.wait_for_readers(due, lambda rank: f"{rank} reads") == "1 reads"
    order = []

    def wait() -> None:
        assert zero.wait_for_readers(due, lambda rank: "") == ""
        order.append("waited")

    def read() -> None:
        time.sleep(0.05)
        order.append("read")
        one.say_read(everyone, ring=True)

    in_threads([wait, read])
    assert order == ["read", "waited"]
    assert zero.wait_for_readers(np.zeros(2, np.int64), lambda rank: "never asked") == ""


@compiled
def _use(address, value):
    store_release(address, value)
    fence_acquire()
    copy_bytes(address + 16, address, 8)
    return load_acquire(address + 16), float_of_bits(np.uint32(0x3FC00000))


def test_raw_memory():
    memory = np.zeros(4, np.int64)
    assert _use(memory.ctypes.data, -7) == (-7, 1.5)
    assert memory.tolist() == [-7, 0, -7, 0]
    bits = np.array([1.5], np.float32).view(np.uint32)[0]
    assert bits == 0x3FC00000
    assert torch.tensor([1.5]).view(torch.int32).item() == 0x3FC00000
