"""Ranks as threads: large worlds, worlds that are used again, and ranks that fail, end or stay away."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, LostRankError
from evenmoe.placement import Placement
from evenmoe.transport.transport import find_transport
from evenmoe.transport.world import LocalTransport, Rank


def tell_all(rank: Rank, times: int = 1) -> bool:
    right = True
    for number in range(times):
        for group in (rank.ep, rank.tp):
            size = group.world_size
            received = group.exchange_rows(torch.full((size, 1), number * size + group.rank), [1] * size, [1] * size)
            right &= received[:, 0].tolist() == [number * size + s for s in range(size)]
    return right


@pytest.mark.parametrize(("ep_size", "tp_size"), [(16, 1), (8, 2), (64, 1), (32, 2)])
def test_many_ranks(ep_size, tp_size):
    with em.local_world(ep_size, tp_size, timeout_s=60.0) as world:
        assert all(world.run(lambda rank: tell_all(rank, times=10)))


def test_ranks_are_numbered_ep_major():
    """As the devices of the operators' demo are: rank d is EP rank d // tp and TP rank d % tp."""
    with em.local_world(3, 2) as world:
        found = world.run(lambda rank: (rank.index, rank.ep.rank, rank.tp.rank, rank.ep.name, rank.tp.name))
    assert [known[:3] for known in found] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0), (5, 2, 1)]
    assert len({known[3] for known in found}) == 2
    assert len({known[4] for known in found}) == 3


def lost(rank: Rank) -> LostRankError | None:
    try:
        rank.ep.exchange_counts(torch.zeros((rank.ep.world_size, 1), dtype=torch.int64))
    except LostRankError as error:
        return error
    return None


def test_a_rank_that_raises_is_named_and_nobody_waits():
    seen: dict[int, LostRankError | None] = {}

    def step(rank: Rank) -> None:
        if rank.index == 2:
            raise KeyError("no such expert")
        seen[rank.index] = lost(rank)

    with em.local_world(4, timeout_s=60.0) as world:
        with pytest.raises(KeyError) as caught:
            world.run(step)
        assert caught.value.rank == 2
        if sys.version_info >= (3, 11):
            assert caught.value.__notes__ == ["raised on rank 2 of 4"]
        assert {index: error.ranks for index, error in seen.items()} == {0: (2,), 1: (2,), 3: (2,)}
        assert str(seen[0]) == (
            f"rank 0 waits in group {world.ranks[0].ep.name!r} for rank 2, which failed with KeyError: 'no such expert'"
        )
        assert all(world.run(tell_all))


def test_the_first_failure_is_the_one_that_is_raised():
    """Not the LostRankErrors that it causes."""

    def step(rank: Rank) -> None:
        if rank.index == 1:
            time.sleep(0.1)
            raise ZeroDivisionError
        rank.ep.exchange_counts(torch.zeros((3, 1), dtype=torch.int64))

    with em.local_world(3, timeout_s=60.0) as world, pytest.raises(ZeroDivisionError):
        world.run(step)


def test_a_rank_that_returns_early_is_named():
    with em.local_world(3, 2, timeout_s=60.0) as world:
        found = world.run(lambda rank: None if rank.ep.rank == 1 else lost(rank))
        names = [world.ranks[t].ep.name for t in range(2)]
        for index in (0, 1, 4, 5):
            assert found[index].ranks == (1,)
            assert str(found[index]) == (
                f"rank {index // 2} waits in group {names[index % 2]!r} for rank 1, which ended its part of the run"
            )
        assert all(world.run(tell_all))


def test_ranks_that_stay_away_are_named_after_the_timeout():
    begun = threading.Barrier(2)
    over = threading.Barrier(4)  # they must not end before, or their end would be the reason

    def step(rank: Rank) -> LostRankError | None:
        if rank.index in (0, 2):
            begun.wait(60.0)  # else one might give up before the other has come
        error = lost(rank) if rank.index in (0, 2) else None
        over.wait(60.0)
        return error

    with em.local_world(4, timeout_s=3.0) as world:
        found = world.run(step)
        for index in (0, 2):
            assert found[index].ranks == (1, 3)
            assert str(found[index]) == (
                f"rank {index} waited 3 s in group {world.ranks[0].ep.name!r} for ranks [1, 3], which did not call"
            )
        assert all(world.run(tell_all))


def test_a_rank_that_comes_too_late_learns_who_gave_up():
    given_up = threading.Event()

    def step(rank: Rank) -> LostRankError | None:
        if rank.index == 0:
            error = lost(rank)
            given_up.set()
            return error
        given_up.wait(60.0)
        rank.ep.exchange_counts(torch.zeros((2, 1), dtype=torch.int64))  # rank 0 had posted before it gave up
        return lost(rank)

    with em.local_world(2, timeout_s=0.2) as world:
        zero, one = world.run(step)
    assert zero.ranks == (1,)
    assert one.ranks == (0,)
    assert str(one).endswith("for rank 0, which gave up after 0.2 s of waiting for ranks [1]")


def test_a_closed_transport_is_missed():
    def step(rank: Rank) -> LostRankError | None:
        if rank.index == 0:
            rank.close()
            time.sleep(0.2)
            return None
        return lost(rank)

    with em.local_world(2, timeout_s=60.0) as world:
        error = world.run(step)[1]
    assert "for rank 0, which closed its transport" in str(error)


def test_a_failure_in_one_group_wakes_the_other_group():
    """Rank (0, 1) fails; its TP peer waits for it in one group, the rest of its EP group in another."""
    woken: dict[int, tuple[int, ...]] = {}

    def step(rank: Rank) -> None:
        if rank.index == 1:
            raise ValueError("gone")
        group = rank.tp if rank.ep.rank == 0 else rank.ep
        size = group.world_size
        try:
            group.exchange_counts(torch.zeros((size, 1), dtype=torch.int64))
        except LostRankError as error:
            woken[rank.index] = error.ranks

    with em.local_world(2, 2, timeout_s=60.0) as world, pytest.raises(ValueError, match="gone"):
        world.run(step)
    assert woken[0] == (1,)  # TP rank 1 of EP rank 0
    assert woken[3] == (0,)  # EP rank 0 of the second EP group


@pytest.mark.parametrize(
    ("sizes", "timeout_s", "text"),
    [
        ((0, 1), 1.0, "`ep_size` is 0: it must be 1 or more; a world has at least one rank."),
        ((-3, 1), 1.0, "`ep_size` is -3: it must be 1 or more; a world has at least one rank."),
        ((1, 0), 1.0, "`tp_size` is 0: it must be 1 or more; a world has at least one rank."),
        ((1, 3), 1.0, "`tp_size` is 3: it must be 1 or 2; the operators serve two tensor-parallel peers at most."),
        ((1.5, 1), 1.0, "`ep_size` is 1.5: it must be an integer; pass the number of ranks."),
        ((True, 1), 1.0, "`ep_size` is True: it must be 1 or more; a world has at least one rank."),
        *(
            (
                (1, 1),
                wrong,
                f"`timeout_s` is {wrong!r}: it must be a number of seconds above 0; say how long to wait for a rank.",
            )
            for wrong in (0, -1.0, math.nan, math.inf, "5", None, True)
        ),
    ],
)
def test_what_makes_no_world_is_refused(sizes, timeout_s, text):
    with pytest.raises(ConstraintError) as caught, em.local_world(*sizes, timeout_s=timeout_s):
        pass
    assert str(caught.value) == text


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with em.local_world(3) as world:
        inside = world.run(lambda rank: torch.get_num_threads())
    assert torch.get_num_threads() == before
    assert all(1 <= n <= max(1, before // 3) for n in inside)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_rows_are_not_kept():
    """A board that held on to what was posted would keep every step's rows alive."""
    kept = []

    def step(rank: Rank) -> None:
        rows = torch.zeros(2, 1000)
        kept.append(weakref.ref(rows))
        rank.ep.exchange_rows(rows, [1, 1], [1, 1])

    with em.local_world(2) as world:
        world.run(step)
        gc.collect()
        assert [reference() for reference in kept] == [None, None]


def test_groups_are_found_by_name_while_they_are_open():
    with em.local_world(2) as world:
        group = world.ranks[1].ep
        assert find_transport("group_ep", group.name, 1, 2) is group
        with pytest.raises(ConstraintError) as caught:
            find_transport("group_ep", group.name, 1, 3)
        assert (caught.value.argument, caught.value.value) == ("group_ep", f"{group.name!r} with 2 ranks")
        with pytest.raises(ConstraintError, match="must name an open group that this rank belongs to"):
            find_transport("group_ep", "no such group", 0, 2)
    with pytest.raises(ConstraintError):
        find_transport("group_ep", group.name, 1, 2)


def test_worlds_do_not_meet():
    """Two worlds at once, each in threads of its own."""
    results: dict[int, bool] = {}

    def use(number: int) -> None:
        with em.local_world(3, timeout_s=60.0) as world:
            results[number] = all(world.run(lambda rank: tell_all(rank, times=50)))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True, 2: True}


def test_a_closed_world_refuses():
    with em.local_world(2) as world:
        layer = em.ExpertParallel(world.ranks[0].ep, Placement([[0, 1]], 2).eplb_table(0), num_slots=2)
    with pytest.raises(ConstraintError) as caught:
        world.run(lambda rank: None)
    assert str(caught.value) == (
        "`run` is called on a world that has been closed: it needs an open world; open another."
    )
    with pytest.raises(ConstraintError) as caught:
        layer.dispatch(torch.ones(1, 1), torch.zeros((1, 1), dtype=torch.int64), torch.ones(1, 1))
    assert str(caught.value) == (
        f"`ep` is group {world.ranks[0].ep.name!r}, which is closed: it must be open; make calls before the world is "
        "closed, or open another one."
    )
    world.close()  # once more


def test_two_threads_cannot_run_one_world():
    inside, done = threading.Event(), threading.Event()

    def step(rank: Rank) -> bool:
        inside.set()
        return done.wait(60.0)

    with em.local_world(2) as world:
        other = threading.Thread(target=world.run, args=(step,))
        other.start()
        assert inside.wait(60.0)
        with pytest.raises(ConstraintError) as caught:
            world.run(lambda rank: None)
        done.set()
        other.join()
        assert world.run(lambda rank: rank.index) == [0, 1]
    assert str(caught.value) == (
        "`run` is called while another thread runs the same world: it serves one call at a time; wait for it, or open "
        "a world for each thread."
    )


def test_two_threads_cannot_call_on_one_rank():
    """The second thread is refused while the first waits in an exchange, which then ends as if nothing had been."""
    waiting = threading.Event()

    class Slow(LocalTransport):
        def _meet(self, value, members):
            waiting.set()
            return super()._meet(value, members)

    refused: list[str] = []

    def step(rank: Rank) -> list:
        layer = em.ExpertParallel(rank.ep, Placement([[0, 1]], 2).eplb_table(0), num_slots=2)

        def call() -> list:
            rows = layer.dispatch(torch.ones(1, 1), torch.tensor([[0]]), torch.ones(1, 1))
            return layer.combine(rows, rows.rows).tolist()

        if rank.index == 1:
            waiting.wait(60.0)
            with pytest.raises(ConstraintError) as caught:
                em.ExpertParallel(
                    world.ranks[0].ep, Placement([[0, 1]], 2).eplb_table(0), num_slots=2, layer=0
                ).dispatch(torch.ones(1, 1), torch.tensor([[0]]), torch.ones(1, 1))
            refused.append(str(caught.value))
        else:
            rank.ep.__class__ = Slow
        return call()

    with em.local_world(2, timeout_s=60.0) as world:
        assert world.run(step) == [[[1.0]], [[1.0]]]
    assert refused == [
        f"`ep` is group {world.ranks[0].ep.name!r}, in the midst of another call of rank 0: it serves one call of a "
        "rank at a time; let the calls of a rank follow each other, or open a group for each of its threads."
    ]


INTERRUPTED = """
import os, signal, sys, threading, time
import torch
import evenmoe as em

waiting = threading.Barrier(3)

def step(rank):
    if rank.index == 0:
        waiting.wait(60.0)
        if sys.argv[1] == "elsewhere":
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)
        if sys.argv[1] == "computes":
            time.sleep(600.0)
    else:
        waiting.wait(60.0)
    rank.ep.exchange_counts(torch.zeros((3, 1), dtype=torch.int64))
    rank.ep.exchange_counts(torch.zeros((3, 1), dtype=torch.int64))
    time.sleep(0.0 if rank.index else 600.0)

with em.local_world(3, timeout_s=500.0) as world:
    try:
        world.run(step)
    except KeyboardInterrupt:
        print("interrupted")
    try:
        world.run(lambda rank: None)
    except ValueError as error:
        print(error)
with em.local_world(3) as world:
    print(world.run(lambda rank: rank.index))
"""


@pytest.mark.parametrize("rank_0", ["computes", "waits", "elsewhere"])
def test_an_interrupt_ends_a_run_at_once(rank_0):
    """One rank computes (sleeps) for ten minutes; the others wait for it in an exchange.

    "elsewhere": the signal does not arrive in the main thread, or it arrives just before that begins to wait, which
    looks the same to it.
    """
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, rank_0], check=False, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines() == [
        "interrupted",
        "`run` is called on a world that was ended by KeyboardInterrupt: it needs an open world; open another.",
        "[0, 1, 2]",
    ]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_share_a_connection(copier):
    with em.local_world(2) as world:
        assert copier(world.ranks[0].ep) is world.ranks[0].ep


def test_connections_and_layers_are_not_pickled():
    with em.local_world(2) as world:
        end = world.ranks[0].ep
        layer = em.ExpertParallel(end, Placement([[0, 1]], 2).eplb_table(0), num_slots=2)
        texts = []
        for thing in (end, layer):
            with pytest.raises(ConstraintError) as caught:
                pickle.dumps({"model": thing})
            texts.append(str(caught.value))
    assert texts == [
        "`LocalTransport` is an open connection to other ranks: it cannot be pickled; pickle the placement, and open "
        "the world anew where it is loaded.",
        "`ExpertParallel` is a layer with an open connection to other ranks: it cannot be pickled; pickle its "
        "placement, and make the layer anew where it is loaded.",
    ]


def test_after_a_lost_rank_the_group_is_closed_for_good():
    """Until the next run of the world."""

    def step(rank: Rank) -> list[tuple[int, ...]] | None:
        if rank.index == 1:
            return None
        return [lost(rank).ranks, lost(rank).ranks, str(lost(rank))]

    with em.local_world(3, timeout_s=60.0) as world:
        first, _, third = world.run(step)
        name = world.ranks[0].ep.name
        assert all(world.run(tell_all))
    for index, found in ((0, first), (2, third)):
        assert found[:2] == [(1,), (1,)]
        assert found[2] == (
            f"group {name!r} is closed for good on rank {index}: rank {index} waits in group {name!r} for rank 1, "
            "which ended its part of the run; open another world"
        )


def test_the_cause_is_named_and_not_those_who_stopped_because_of_it():
    """Rank 2 fails; rank 0 stops because of that; rank 1, which comes last, waits for both."""
    stopped = threading.Event()

    def step(rank: Rank) -> tuple[int, ...] | None:
        if rank.index == 2:
            raise KeyError("gone")
        if rank.index == 1:
            stopped.wait(60.0)
            time.sleep(0.05)
            found.append(lost(rank).ranks)
            return None
        try:
            rank.ep.exchange_counts(torch.zeros((3, 1), dtype=torch.int64))
        finally:
            stopped.set()

    found: list[tuple[int, ...]] = []
    with em.local_world(3, timeout_s=60.0) as world, pytest.raises(KeyError):
        world.run(step)
    assert found == [(2,)]
