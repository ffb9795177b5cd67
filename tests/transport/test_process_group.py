"""Ranks as gloo processes: ones that die or stay away, and how a world of processes is opened."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.errors import ConstraintError, LostRankError
from evenmoe.transport.transport import find_transport
from evenmoe.transport.world import Rank
from tests.processes import Processes


@pytest.fixture
def mortal_processes():
    """Three processes of one test alone, since one of them will not survive it."""
    pool = Processes(3, [(3, 1)], timeout_s=60.0)
    yield pool
    pool.stop()


def die_midway(rank: Rank) -> tuple[str, tuple[int, ...]]:
    ids = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    em.dispatch(torch.ones(2, 4), ids, ep=rank.ep, num_experts=3)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        em.dispatch(torch.ones(2, 4), ids, ep=rank.ep, num_experts=3)
    except LostRankError as error:
        return str(error), error.ranks
    return "", ()


def test_a_process_that_is_killed(mortal_processes):
    zero, one, two = mortal_processes.run((3, 1), die_midway, patience_s=40.0)
    assert one is None
    for index, (text, ranks) in ((0, zero), (2, two)):
        assert text.startswith(f"rank {index} lost rank 1 of group ")
        assert "which ended: its process is gone (" in text
        assert ranks == (1,)


def stay_away(rank: Rank) -> tuple[str, tuple[int, ...]]:
    if rank.index == 0:
        time.sleep(4.0)
        return "", ()
    try:
        rank.ep.exchange_counts(torch.zeros((2, 1), dtype=torch.int64))
    except LostRankError as error:
        return str(error), error.ranks
    return "no error", ()


def test_a_process_that_stays_away():
    pool = Processes(2, [(2, 1)], timeout_s=2.0)
    try:
        away, waiting = pool.run((2, 1), stay_away, patience_s=30.0)
    finally:
        pool.stop()
    assert away == ("", ())
    assert waiting[0].startswith("rank 1 lost rank 0 of group ")
    assert ", which did not call (" in waiting[0]
    assert waiting[1] == (0,)


def open_wrongly(rank: Rank) -> tuple[str, str, str]:
    try:
        em.process_world(3, 2)
    except ConstraintError as error:
        return error.argument, error.value, error.fix
    return "", "", ""


def test_sizes_that_are_not_the_number_of_processes(processes):
    assert set(processes.run((4, 1), open_wrongly)) == {
        ("ep_size", "3 with tp_size 2", "use ep_size=2 with tp_size=2, or start 6 processes")
    }


def open_and_close(rank: Rank) -> tuple[bool, str]:
    opened = em.process_world(2, 2, timeout_s=30.0)
    received = opened.tp.exchange_counts(torch.full((2, 1), opened.index))[:, 0].tolist()
    name = opened.ep.name
    opened.close()
    try:
        find_transport("group_ep", name, opened.ep.rank, 2)
    except ConstraintError as error:
        return received == [rank.index // 2 * 2, rank.index // 2 * 2 + 1], error.argument
    return False, "still open"


def test_a_world_is_given_back(processes):
    assert processes.run((4, 1), open_and_close) == [(True, "group_ep")] * 4
    assert processes.run((4, 1), identify) == [(i, i, 0, 4, 1) for i in range(4)]
    assert processes.run((2, 2), identify) == [(0, 0, 0, 2, 2), (1, 0, 1, 2, 2), (2, 1, 0, 2, 2), (3, 1, 1, 2, 2)]


def identify(rank: Rank) -> tuple[int, ...]:
    return rank.index, rank.ep.rank, rank.tp.rank, rank.ep.world_size, rank.tp.world_size


def start_as_torchrun_does(rank: Rank, port: int) -> tuple[int, str]:
    """In a process whose torch.distributed is closed again first."""
    dist.destroy_process_group()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    opened = em.process_world(1, backend="gloo")
    ids = torch.tensor([[0]], dtype=torch.int32)
    d = em.dispatch(torch.ones(1, 4), ids, ep=opened.ep, num_experts=1)
    return int(d.ep_recv_counts[-1]), dist.get_backend()


def test_torch_distributed_is_started_if_it_is_not():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pool = Processes(1, [(1, 1)])
    try:
        assert pool.run((1, 1), start_as_torchrun_does, port, patience_s=30.0) == [(1, "gloo")]
    finally:
        pool.stop()
