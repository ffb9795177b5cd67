"""Between placements of worlds of different sizes: copies, their sources, and layers that belong together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.formats.difference import diff
from evenmoe.placement import Placement
from tests.test_placement_uneven import rows_of, uneven


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4).flatmap(lambda experts: uneven(experts=experts)), st.data())
def test_copies_and_sources_by_the_definition(before, data):
    """With sets: who needs what, and whether each source held it, on the same node if any rank there did."""
    after = data.draw(uneven(experts=before.num_experts))
    dead = data.draw(st.sets(st.integers(0, before.num_ranks - 1)))
    near = data.draw(st.integers(1, 4))
    found = diff(before, after, ranks_per_node=near, dead_ranks=dead)
    sent: dict[int, int] = {}
    expected = []
    for layer in range(2):
        held = [set() if rank in dead else set(row) for rank, row in enumerate(rows_of(before, layer))]
        for rank, row in enumerate(rows_of(after, layer)):
            for expert in row:
                if rank < len(held) and expert in held[rank]:
                    continue
                holders = [source for source, experts in enumerate(held) if expert in experts]
                holders = [source for source in holders if source // near == rank // near] or holders
                source = min(holders, key=lambda source: (sent.get(source, 0), source), default=-1)
                sent[source] = sent.get(source, 0) + 1
                expected.append([layer, expert, source, rank])
    assert found.moves.tolist() == expected
    assert found.copies.sum() == len(expected)
    assert found.sent.tolist() == [sent.get(rank, 0) for rank in range(max(before.num_ranks, after.num_ranks))]
    if not dead:
        assert found.copies.sum(axis=1).tolist() == em.count_copies(before, after).tolist()


def test_growth_and_shrink():
    small, large = Placement([[0, 1, 2, 3]], 2), Placement([[0, 1, 2, 3, 0, 3]], 3)
    assert diff(small, large).copies.tolist() == [[0, 0, 2]]
    assert diff(large, small).copies.tolist() == [[0, 0]]
    assert diff(large, small).slots_changed.tolist() == [-1]
    fallen = Placement([[0, 1, 2, 3]], 3, rank_sizes=[2, 0, 2])
    assert diff(large, fallen, dead_ranks=[1]).moves.tolist() == [[0, 2, -1, 2]]
    assert diff(large, fallen).moves.tolist() == [[0, 2, 1, 2]]
    assert diff(large, large, dead_ranks=[1]).moves.tolist() == [[0, 2, -1, 1], [0, 3, 2, 1]]


def test_ranks_that_cannot_be_dead():
    with pytest.raises(ConstraintError) as caught:
        diff(Placement([[0, 1]], 2), Placement([[0, 1, 0]], 3), dead_ranks=[2])
    assert str(caught.value) == "`dead_ranks` is 2: it must be a rank of the previous placement, 0 to 1; leave it out."
    with pytest.raises(ConstraintError, match="`ranks_per_node` is 0: it must be at least 1"):
        diff(Placement([[0, 1]], 2), Placement([[0, 1]], 2), ranks_per_node=0)


def test_the_way_there_leads_there():
    """Following the moves from what ranks held makes each rank able to hold its new experts."""
    rng = np.random.default_rng(0)
    before = Placement(rng.permuted(np.tile(np.arange(16), (3, 2)), axis=1), 8)
    after = Placement(rng.permuted(np.tile(np.arange(16), (3, 2)), axis=1)[:, :32], 6, rank_sizes=[6, 6, 5, 5, 5, 5])
    held = [[set(row) for row in rows_of(before, layer)] for layer in range(3)]
    for layer, expert, source, target in diff(before, after).moves.tolist():
        assert expert in rows_of(before, layer)[source]
        held[layer][target].add(expert)
    for layer in range(3):
        assert all(set(row) <= held[layer][rank] for rank, row in enumerate(rows_of(after, layer)))
