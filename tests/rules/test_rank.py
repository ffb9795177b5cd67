"""The rule "rank": its shares, and the replicas that it reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenmoe.reference.update_expert import update_expert
from evenmoe.rules import RULES, rank
from tests.rules.sampled import placement_with


@pytest.mark.parametrize("num_ranks", [1, 5, 6, 8, 16])
def test_shares_are_what_the_ranks_choose(num_ranks):
    for count in range(1, num_ranks + 1):
        placement = placement_with(count, num_ranks)
        table = placement.eplb_table(0)
        taken = np.zeros(placement.num_slots)
        for source in range(num_ranks):
            ids, _ = update_expert(torch.tensor([[0]]), table, local_rank_id=source, world_size=num_ranks)
            taken[int(ids)] += 1
        mine = placement.slot_to_expert[0] == 0
        assert RULES.get("rank").shares(placement)[0, mine].tolist() == (taken[mine] / num_ranks).tolist()
        assert rank.reachable(count, num_ranks) == (taken > 0).sum()


def test_reachable_counts_of_the_specification():
    # §1.4, and the counts that lose replicas on 16, 32 and 64 ranks
    assert rank.reachable([3, 5, 6, 7], 8).tolist() == [3, 4, 4, 4]
    assert rank.reachable([4], 6) == 3
    assert rank.reachable([5, 6, 7, *range(9, 16)], 16).tolist() == [4, 6, 6] + [8] * 7
    assert rank.reachable([9, 10, 12, 15], 32).tolist() == [8, 8, 11, 11]
    assert rank.reachable([9, 12, 11, 14, 15, 13], 64).tolist() == [8, 11, 11, 13, 13, 13]
    assert rank.reachable([250], 384) == 192
    for world in (288, 384):
        assert rank.reachable(np.arange(1, 16), world).tolist() == list(range(1, 16))
