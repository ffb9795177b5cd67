"""Placements whose ranks have different numbers of slots: what they say and count, and who says that it cannot."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.metrics import even_rank_loads
from evenmoe.placement import Placement, layers_of
from evenmoe.rules import RULES
from evenmoe.rules.split_batch import SplitPlan


@st.composite
def uneven(draw: st.DrawFn, layers: int = 2, experts: int | None = None) -> Placement:
    """1 to 6 ranks of 0 to 4 slots, one at least; experts and slots at random."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= (experts or 1)))
    experts = draw(st.integers(1, sum(sizes))) if experts is None else experts
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    more = rng.integers(0, experts, (layers, sum(sizes) - experts))
    slots = np.hstack([np.tile(np.arange(experts), (layers, 1)), more])
    return Placement(rng.permuted(slots, axis=1), len(sizes), num_experts=experts, rank_sizes=sizes)


def rows_of(placement: Placement, layer: int) -> list[list[int]]:
    """The experts of each rank, by slices."""
    rows, start = [], 0
    for size in placement.rank_sizes:
        rows.append(placement.slot_to_expert[layer, start : start + size].tolist())
        start += size
    return rows


def test_equal_sizes_are_no_sizes():
    """Such a placement is an even one in every way."""
    even, said = Placement([[0, 1, 0, 2]], 2), Placement([[0, 1, 0, 2]], 2, rank_sizes=[2, 2])
    assert even == said
    assert hash(even) == hash(said)
    assert repr(said) == "Placement(layers=1, experts=3, slots=4, ranks=2)"
    assert (said.is_even, said.slots_per_rank, said.rank_sizes) == (True, 2, (2, 2))


def test_sizes_tell_placements_apart():
    one, other = (Placement([[0, 1, 0, 2, 1, 0]], 3, rank_sizes=sizes) for sizes in ([1, 2, 3], [3, 2, 1]))
    assert len({one, other, Placement([[0, 1, 0, 2, 1, 0]], 3)}) == 3
    assert repr(one) == "Placement(layers=1, experts=3, slots=6, ranks=3, rank_sizes=[1, 2, 3])"
    with pytest.raises(AttributeError, match="immutable"):
        one.rank_sizes = (2, 2, 2)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("sizes", "shown"), [([3, 2], "[3, 2]"), ([2, 2, 2, -1, 0], "[2 x3, -1, 0]"), ([[6]], "[of shape (1, 1)]")]
)
def test_sizes_that_do_not_fit(sizes, shown):
    with pytest.raises(ConstraintError) as caught:
        Placement([[0, 1, 2, 0, 1, 2]], len(sizes), rank_sizes=sizes)
    assert str(caught.value) == (
        f"`rank_sizes` is {shown}: it must give each of the {len(sizes)} ranks 0 slots or more, 6 together; "
        "count the slots of each rank."
    )


def test_what_needs_even_slots_says_so():
    placement = Placement([[0, 1, 2]], 2, rank_sizes=[2, 1])
    for needs_even in (lambda: placement.eplb_table(0), lambda: placement.eplb_array(0)):
        with pytest.raises(ConstraintError, match="must have the same number of slots on every rank here"):
            needs_even()
    with pytest.raises(ConstraintError) as caught:
        _ = placement.slots_per_rank
    assert str(caught.value) == (
        "`placement` is one whose ranks have 2, 1 slots: it must have the same number of slots on every rank here; "
        "plan with one number of slots for all ranks, and without dead ranks."
    )


@settings(max_examples=60, deadline=None)
@given(uneven())
def test_ranks_and_copies_of_it(placement):
    for again in (pickle.loads(pickle.dumps(placement)), copy.deepcopy(placement), layers_of(placement, [0, 1])):
        assert again == placement
        assert hash(again) == hash(placement)
    for layer in range(2):
        rows = rows_of(placement, layer)
        assert placement.slot_to_rank.tolist() == [rank for rank, row in enumerate(rows) for _ in row]
        held = [sorted(np.flatnonzero(row).tolist()) for row in placement.held[layer]]
        assert held == [sorted(set(row)) for row in rows]


@settings(max_examples=60, deadline=None)
@given(uneven(), st.integers(0, 99))
def test_loads_of_ranks(placement, seed):
    """Against sums over slices. A float64 sum of at most 24 terms below 100 is within 24 × 2⁻⁵³ × 2,400 of exact."""
    load = np.random.default_rng(seed).integers(0, 100, (3, 2, placement.num_experts)).astype(float)
    expected = np.zeros((3, 2, placement.num_ranks))
    for window, layer in np.ndindex(3, 2):
        for rank, row in enumerate(rows_of(placement, layer)):
            count = placement.num_replicas[layer]
            expected[window, layer, rank] = sum(load[window, layer, expert] / count[expert] for expert in row)
    assert np.allclose(even_rank_loads(load, placement), expected, rtol=0, atol=1e-11)
    assert np.allclose(RULES.get("even").rank_loads(load, placement), expected, rtol=0, atol=1e-11)
    for window, layer in np.ndindex(3, 2):
        used = [value for value, size in zip(expected[window, layer], placement.rank_sizes, strict=True) if size]
        par = max(used) / (sum(used) / len(used)) if sum(used) else 1.0
        assert em.peak_to_average(load, placement)[window, layer] == pytest.approx(par, rel=1e-12)


def test_rank_rule_shares_are_those_of_the_table_row():
    """Which rank chooses a replica depends on its place in the row, not on the slots of a rank."""
    slots, order = [[0, 1, 0, 2, 0, 1]], [[0, 0, 1, 0, 2, 1]]
    one = Placement(slots, 3, rank_sizes=[1, 2, 3], replica_index=order)
    rule = RULES.get("rank")
    assert rule.slot_loads([[6, 4, 2]], one).tolist() == rule.slot_loads([[6, 4, 2]], Placement(slots, 3)).tolist()


@settings(max_examples=60, deadline=None)
@given(uneven(layers=1), st.integers(0, 99))
def test_the_best_split_of_a_batch(placement, seed):
    """The smallest peak by trying all splits of at most 5 tokens per expert over the ranks that hold it."""
    tokens = np.random.default_rng(seed).integers(0, 4, placement.num_experts)
    plan = SplitPlan(placement.slot_to_expert[0], placement.num_ranks, rank_sizes=placement.rank_sizes)
    per_slot = plan.split(tokens) if plan.num_experts == placement.num_experts else None
    assert per_slot is not None
    assert [per_slot[placement.slot_to_expert[0] == e].sum() for e in range(placement.num_experts)] == tokens.tolist()
    ranks = np.bincount(placement.slot_to_rank, per_slot, placement.num_ranks)
    reached = {(0,) * placement.num_ranks}
    for expert, count in enumerate(tokens.tolist()):
        for _ in range(count):
            holders = np.flatnonzero(placement.held[0, :, expert])
            reached = {(*at[:rank], at[rank] + 1, *at[rank + 1 :]) for at in reached for rank in holders}
            least = min(map(max, reached))
            reached = {at for at in reached if max(at) <= least + int(tokens.sum())}
        if len(reached) > 3000:
            return  # the world is too large to try all
    assert ranks.max() == min(map(max, reached))
