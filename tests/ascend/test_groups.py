"""Two streams of one rank on one group: their calls take turns instead of mixing their exchanges."""

from __future__ import annotations

import threading
import time

from evenmoe.ascend.groups import Membership, taking_part
from tests.patience import HANG_S


def test_calls_of_one_rank_on_one_group_take_turns() -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def call() -> None:
        nonlocal inside, most
        with taking_part([Membership("turns", 0, (0,))]):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.005)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_other_ranks_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(2, timeout=HANG_S)

    def call(rank: int) -> None:
        with taking_part([Membership("turns", rank, (0, 1))]):
            both.wait()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken
