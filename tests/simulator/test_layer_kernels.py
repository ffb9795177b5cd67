"""Shares and rows from counts, against the same assignment by assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.rules import RULES
from evenmoe.simulator import batch_kernels, layer_kernels
from tests.simulator.plain_loops import choose

COMPILED = [name for name in RULES if RULES.get(name).kernel is not None]  # of another, the simulator calls `choose`


def test_the_rules_have_the_numbers_of_the_kernels():
    for name in COMPILED:
        assert RULES.get(name).kernel == getattr(layer_kernels, name.upper())


@st.composite
def worlds(draw):
    """A placement whose replicas are in any order, and routing (G, B, K)."""
    ranks, width, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    experts = draw(st.integers(1, ranks * width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, ranks * width - experts)])
    rng.shuffle(slots)
    order = np.zeros(len(slots), np.int64)
    for expert in range(experts):
        held = np.flatnonzero(slots == expert)
        order[held] = rng.permutation(len(held))
    top_k = draw(st.integers(1, experts))
    skew = rng.exponential(size=experts) ** 3
    routing = np.argsort(-(np.log(skew) + rng.gumbel(size=(ranks, tokens, experts))), axis=2)[:, :, :top_k]
    return em.Placement(slots[None], ranks, num_experts=experts, replica_index=order[None]), np.ascontiguousarray(
        routing
    )


def table(placement):
    first = np.concatenate([[0], np.cumsum(placement.num_replicas[0])]).astype(np.int64)
    slots = np.zeros(placement.num_slots, np.int64)
    for slot, expert in enumerate(placement.slot_to_expert[0].tolist()):
        slots[first[expert] + placement.replica_index[0, slot]] = slot
    return first, slots


@settings(deadline=None)
@given(worlds(), st.sampled_from(COMPILED))
def test_routing_and_counts_give_the_same_shares_as_plain_loops(world, rule):
    placement, routing = world
    first, slots = table(placement)
    counts = np.full((placement.num_experts, placement.num_ranks), -1, np.int32)
    batch_kernels.count_assignments(routing, counts)
    quotas = em.split_batch(counts.sum(axis=1), placement.slot_to_expert[0], placement.num_ranks)
    chosen = np.full(routing.shape, -1, np.int32)
    layer_kernels.choose_slots(routing, first, slots, RULES.get(rule).kernel, quotas, chosen)
    assert chosen.tolist() == choose(placement, 0, routing.tolist(), rule)
    per_slot = np.full((placement.num_slots, placement.num_ranks), -1, np.int32)
    layer_kernels.count_chosen(chosen, per_slot)
    expected = np.zeros_like(per_slot)
    for rank in range(placement.num_ranks):
        for slot in chosen[rank].ravel():
            expected[slot, rank] += 1
    np.testing.assert_array_equal(per_slot, expected)
    if rule != "token":
        per_slot[:] = -1
        layer_kernels.share_counts(counts, first, slots, RULES.get(rule).kernel, quotas, per_slot)
        np.testing.assert_array_equal(per_slot, expected)


def test_quotas_that_do_not_cover_the_assignments_leave_them_to_the_last_replica():
    counts = np.array([[4, 3]], np.int32)
    per_slot = np.zeros((2, 2), np.int32)
    layer_kernels.share_counts(
        counts, np.array([0, 2]), np.array([1, 0]), layer_kernels.BATCH, np.array([1, 2]), per_slot
    )
    assert per_slot.tolist() == [[2, 3], [2, 0]]


def test_many_tokens_take_turns_exactly():
    """The floor is taken by a multiplication, which must not be off by one anywhere."""
    for count in (2, 3, 7, 49, 320):
        assignments = np.concatenate([np.arange(2000), (np.arange(1, 2000) * count - 1)]).astype(np.int32)
        per_slot = np.zeros((count, assignments.size), np.int32)
        layer_kernels.share_counts(
            assignments[None],
            np.array([0, count]),
            np.arange(count),
            layer_kernels.OCCURRENCE,
            np.zeros(count, np.int64),
            per_slot,
        )
        np.testing.assert_array_equal(per_slot.sum(axis=0), assignments)
        np.testing.assert_array_equal(per_slot.min(axis=0), assignments // count)
        np.testing.assert_array_equal(per_slot.max(axis=0), -(-assignments // count))


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=3),
)
def test_expected_rows_are_the_mean_over_all_ways_to_choose(tokens, counts):
    """One rank with up to three slots, three source ranks: average over every choice of the rows behind each count."""
    per_slot = np.minimum(np.array(counts, np.int32), tokens)
    elsewhere = np.zeros((2 * len(per_slot), 3), np.int32)  # the slots of ranks 1 and 2 take nothing
    sent, received = np.zeros((2, 2, 3))
    layer_kernels.expect_rows_once(np.concatenate([per_slot, elsewhere]), tokens, 3, sent, received)
    for source in (1, 2):
        ways = [list(itertools.combinations(range(tokens), count)) for count in per_slot[:, source].tolist()]
        sizes = [len(set().union(*map(set, way))) for way in itertools.product(*ways)]
        # products of at most three factors with denominators up to 4
        assert sent[0, source] == pytest.approx(np.mean(sizes), abs=1e-12)
    assert sent[0, 0] == 0
    assert received[0].tolist() == pytest.approx([sent[0].sum(), 0, 0], abs=1e-12)
    assert not sent[1].any()


@settings(deadline=None)
@given(worlds(), st.data())
def test_rows_are_counted_at_both_ends(world, data):
    placement, routing = world
    ranks, width = placement.num_ranks, placement.slots_per_rank
    near = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    first, slots = table(placement)
    chosen = np.empty(routing.shape, np.int32)
    layer_kernels.choose_slots(routing, first, slots, layer_kernels.OCCURRENCE, np.zeros(len(slots), np.int64), chosen)
    per_slot = np.empty((placement.num_slots, ranks), np.int32)
    layer_kernels.count_chosen(chosen, per_slot)
    for once in (False, True):
        sent, received = np.zeros((2, 2, ranks))
        if once:
            layer_kernels.count_rows_once(chosen, width, near, sent, received)
        else:
            layer_kernels.count_rows(per_slot, near, sent, received)
        expected_sent, expected_received = np.zeros((2, 2, ranks))
        for rank, token in itertools.product(range(ranks), range(routing.shape[1])):
            targets = (chosen[rank, token] // width).tolist()
            for target in set(targets) if once else targets:
                if target != rank:
                    link = int(target // near != rank // near)
                    expected_sent[link, rank] += 1
                    expected_received[link, target] += 1
        np.testing.assert_array_equal(sent, expected_sent)
        np.testing.assert_array_equal(received, expected_received)
    tokens, busy, padded = np.empty((3, ranks), np.int64)
    layer_kernels.rank_work(per_slot, ranks, 3, tokens, busy, padded)
    whole = -(-per_slot.sum(axis=1) // 3) * 3
    np.testing.assert_array_equal(padded, whole.reshape(ranks, width).sum(axis=1))
    np.testing.assert_array_equal(tokens, per_slot.sum(axis=1).reshape(ranks, width).sum(axis=1))
    np.testing.assert_array_equal(busy, (per_slot.sum(axis=1) > 0).reshape(ranks, width).sum(axis=1))
