"""The plain loops of a decode batch's split, by hand."""

from __future__ import annotations

import pytest

from evenmoe.reference.decode import assign_one, by_size, costs_of, improve, split_decode


def test_one_replica_each_moves_along_a_chain():
    """Ranks 0 and 1 have two and one of their own; of those with a choice, one goes to rank 1 and one to rank 2."""
    holding = {0: [0, 1], 1: [0], 2: [0], 3: [1, 2], 4: [1]}
    homes = assign_one([1, 2, 4, 0, 3], holding, 3)
    counts = [list(homes.values()).count(rank) for rank in range(3)]
    assert counts == [2, 2, 1]


def test_a_chain_of_two_ranks():
    """Rank 0 has three experts and gives one to rank 1, which passes another on to rank 2."""
    holding = {0: [0], 1: [0], 2: [0, 1], 3: [1], 4: [1, 2]}
    homes = assign_one([0, 1, 3, 2, 4], holding, 3)
    assert [sorted(e for e, r in homes.items() if r == rank) for rank in range(3)] == [[0, 1], [2, 3], [4]]


def test_costs_count_each_expert_once():
    assert costs_of({}, 2, 10) == [0, 0]
    assert costs_of({(0, 0): 1, (1, 0): 2, (0, 1): 5}, 3, 10) == [23, 15, 0]


def test_the_largest_take_the_cheapest_rank():
    flows = by_size({5: 9, 6: 4}, {(0, 0): 3}, {0: [0], 5: [0, 1], 6: [0, 1]}, 2, 10)
    assert flows == {(0, 0): 3, (5, 1): 9, (6, 0): 4}


def test_improve_moves_whole_part_and_past_another():
    whole = {(0, 0): 4, (1, 0): 4}
    improve(whole, {0: [0], 1: [0, 1]}, 2, 10, floor=0)
    assert whole == {(0, 0): 4, (1, 1): 4}
    part = {(0, 0): 100}
    improve(part, {0: [0, 1]}, 2, 10, floor=0)  # 110 and 0; half of the 100 that the second weights leave
    assert part == {(0, 0): 50, (0, 1): 50}
    past = {(0, 0): 1, (1, 0): 1, (2, 1): 1, (3, 1): 1}
    improve(past, {0: [0], 1: [0, 1], 2: [1], 3: [1, 2]}, 3, 100, floor=0)
    assert past == {(0, 0): 1, (1, 0): 1, (2, 1): 1, (3, 1): 1}  # 2, 2, 0: the others cost as much, nothing is gained
    full = {(0, 0): 1, (1, 0): 1, (4, 0): 1, (2, 1): 1, (3, 1): 1}
    improve(full, {0: [0], 1: [0, 1], 4: [0], 2: [1], 3: [1, 2]}, 3, 100, floor=0)
    assert full == {(0, 0): 1, (4, 0): 1, (1, 1): 1, (2, 1): 1, (3, 2): 1}
    stopped = {(0, 0): 4, (1, 0): 4}
    improve(stopped, {0: [0], 1: [0, 1]}, 2, 10, floor=28)
    assert stopped == {(0, 0): 4, (1, 0): 4}


def test_the_first_slot_of_a_rank_takes_all():
    assert split_decode([7, 1], [[0, 0], [1, 1]], 10, [[4, 3], [1, 0]]) == [[7, 0], [1, 0]]
    assert split_decode([0, 0], [[0, 0], [1, 1]], 10, [[0, 0], [0, 0]]) == [[0, 0], [0, 0]]


def test_an_expert_without_a_slot():
    with pytest.raises(KeyError):
        split_decode([1, 1], [[0]], 10, [[1]])
