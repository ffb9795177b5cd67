"""Where threads meet: what they bring, what is kept of it, and until when it may be read."""

from __future__ import annotations

import threading

import pytest

from evenmoe.errors import LostRankError
from evenmoe.transport.rendezvous import Rendezvous
from tests.patience import HANG_S


def in_threads(size, job):
    """The results of job(rank) on that many threads."""
    results = [None] * size

    def run(rank):
        results[rank] = job(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    return results


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_get_what_all_brought_and_nothing_is_kept_when_they_have_taken_it(size):
    place, members = Rendezvous("here", size, HANG_S), range(size)

    def job(rank):
        found = []
        for number in range(50):
            exchange = (), number
            brought = place.meet(rank, exchange, (rank, number), members)
            again = place.meet(rank, exchange, (rank, number), members)  # as after a failure in the first
            assert again == brought
            assert place.has_brought(rank, exchange)
            place.take(rank, exchange, members)
            found.append(brought)
        return found

    want = [{rank: (rank, number) for rank in range(size)} for number in range(50)]
    assert in_threads(size, job) == [want] * size
    assert not place._brought


def test_rows_may_be_read_until_all_have_said_that_they_do_not():
    place, order = Rendezvous("here", 3, HANG_S), []

    def job(rank):
        exchange = (), 0
        place.meet(rank, exchange, None, range(3))
        place.take(rank, exchange, range(3))
        if rank:
            order.append("read")
        place.say_read(rank, exchange, range(3))
        if rank == 0:
            place.wait_for_readers(rank, exchange, range(3))
            order.append("written")

    in_threads(3, job)
    assert order == ["read", "read", "written"]


def test_who_waits_for_a_rank_that_left_is_told_why():
    place = Rendezvous("here", 2, HANG_S)
    place.leave(1, "went home")
    for wait in (
        lambda: place.meet(0, ((), 0), None, range(2)),
        lambda: place.wait_for_readers(0, ((), 0), range(2)),
    ):
        with pytest.raises(LostRankError) as raised:
            wait()
        assert str(raised.value) == "rank 0 waits in group 'here' for rank 1, which went home"
        assert raised.value.ranks == (1,)
    place.reset()
    late = Rendezvous("here", 2, 0.05)
    with pytest.raises(LostRankError, match=r"waited 0.05 s in group 'here' for ranks \[1\], which did not call"):
        late.meet(0, ((), 0), None, range(2))
