"""Ranks as threads: large worlds, worlds that are used again, and ranks that fail, end or stay away."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref

import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, LostRankError
from evenmoe.transport import registry
from evenmoe.transport.world import Rank


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
        start = time.monotonic()
        with pytest.raises(KeyError) as caught:
            world.run(step)
        assert time.monotonic() - start < 5.0
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
    over = threading.Barrier(4)  # they must not end before, or their end would be the reason

    def step(rank: Rank) -> LostRankError | None:
        error = lost(rank) if rank.index in (0, 2) else None
        over.wait(20.0)
        return error

    with em.local_world(4, timeout_s=0.3) as world:
        found = world.run(step)
        for index in (0, 2):
            assert found[index].ranks == (1, 3)
            assert str(found[index]) == (
                f"rank {index} waited 0.3 s in group {world.ranks[0].ep.name!r} for ranks [1, 3], which did not call"
            )
        assert all(world.run(tell_all))


def test_a_rank_that_comes_too_late_learns_who_gave_up():
    given_up = threading.Event()

    def step(rank: Rank) -> LostRankError | None:
        if rank.index == 0:
            error = lost(rank)
            given_up.set()
            return error
        given_up.wait(20.0)
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


def test_sizes_that_make_no_world():
    for sizes, name in (((0, 1), "ep_size"), ((1, 0), "tp_size"), ((-3, 1), "ep_size")):
        with pytest.raises(ConstraintError) as caught, em.local_world(*sizes):
            pass
        assert caught.value.argument == name


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
        assert registry.find("group_ep", group.name, 1, 2) is group
        with pytest.raises(ConstraintError) as caught:
            registry.find("group_ep", group.name, 1, 3)
        assert (caught.value.argument, caught.value.value) == ("group_ep", f"{group.name!r} with 2 ranks")
        with pytest.raises(ConstraintError, match="must name an open group that this rank belongs to"):
            registry.find("group_ep", "no such group", 0, 2)
    with pytest.raises(ConstraintError):
        registry.find("group_ep", group.name, 1, 2)


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
