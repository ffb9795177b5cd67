"""The compiled orders of rows against sorted lists of Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.ops.row_order import (
    order_by_source,
    order_received,
    positions_returned,
    rows_of_sums,
    rows_of_tokens,
    sort_assignments,
)

KEYS = st.integers(-3, 6)


@given(st.integers(1, 4), st.lists(KEYS, max_size=24), st.integers(0, 5), st.sampled_from([np.int32, np.int64]))
def test_assignments_by_key(top_k, keys, bound, dtype):
    del keys[len(keys) // top_k * top_k :]
    token, k, expert, counts = sort_assignments(np.array(keys, dtype), bound, top_k)
    kept = sorted((key, i) for i, key in enumerate(keys) if 0 <= key < bound)
    assert expert.tolist() == [key for key, _ in kept]
    assert (token * top_k + k).tolist() == [i for _, i in kept]
    assert counts.tolist() == [keys.count(key) for key in range(bound)]
    assert {a.dtype for a in (token, k, expert, counts)} == {np.dtype(np.int64)}


@given(
    st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.lists(st.integers(0, n - 1)), max_size=4)))
)
def test_a_token_has_one_row_on_a_rank(case):
    num_tokens, by_rank = case
    flat = np.array([token for tokens in by_rank for token in tokens], np.int64)
    split = [[len(tokens) // 2, len(tokens) - len(tokens) // 2] for tokens in by_rank]  # between two local experts
    counts = np.array(split, np.int64).reshape(-1, 2)
    per_rank, rows, sent, assignments = rows_of_tokens(counts, flat, flat + 7, num_tokens)
    assert per_rank.tolist() == [len(tokens) for tokens in by_rank]
    distinct = [sorted(set(tokens)) for tokens in by_rank]
    assert rows.tolist() == [len(tokens) for tokens in distinct]
    assert sent.tolist() == [token for tokens in distinct for token in tokens]
    want = [distinct[rank].index(token) for rank, tokens in enumerate(by_rank) for token in tokens]
    assert assignments.tolist() == [[token, token + 7, row] for token, row in zip(flat.tolist(), want, strict=True)]


@given(
    st.integers(0, 5),
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_positions_of_rows_that_return(num_tokens, top_k, counts, random):
    sent = sum(map(sum, counts))
    entries = random.sample(range(num_tokens * top_k), min(sent, num_tokens * top_k))
    position, entry = np.zeros((num_tokens, top_k), np.int64), np.array(entries, np.int64)
    came = np.array([[sum(row)] for row in counts])
    call = np.array(counts), came, entry // top_k, entry % top_k, position
    if len(entries) < sent:
        with pytest.raises(IndexError, match="other numbers of assignments than there are"):
            positions_returned(*call)
        return
    assert positions_returned(*call)
    expected = [entries.index(i) if i in entries else -1 for i in range(num_tokens * top_k)]
    assert position.flatten().tolist() == expected
    came[-1] += 1
    assert not positions_returned(*call)


@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)),
    st.sampled_from([3, 4]),
    st.randoms(use_true_random=False),
)
def test_received_assignments_by_expert_and_source(counts, columns, random):
    came = [(e, s, i) for s, row in enumerate(counts) for e, n in enumerate(row) for i in range(n)]
    numbers = np.array([[random.randrange(9) for _ in range(columns)] for _ in came], np.int32).reshape(-1, columns)
    first = np.array([random.randrange(99) for _ in counts])
    row, source, ordered = order_received(np.array(counts), first, numbers)
    order = sorted(range(len(came)), key=lambda i: came[i])
    assert source.tolist() == [came[i][1] for i in order]
    assert ordered.tolist() == [numbers[i].tolist() for i in order]
    assert row.tolist() == [first[came[i][1]] + numbers[i, 2] for i in order]


@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_rows_of_sums_are_in_order_and_without_gaps(num_sums, top_k, random):
    entries = [(row, k) for row in range(num_sums) for k in range(top_k) if random.random() < 0.6]
    random.shuffle(entries)
    which, k = np.array([(*entry,) for entry in entries], np.int64).reshape(-1, 2).T
    weights = np.array([random.random() for _ in entries])
    position, weight = np.full((num_sums, top_k), 9), np.full((num_sums, top_k), 9.0)
    rows_of_sums(which, k.astype(np.int32), weights, position, weight)
    for row in range(num_sums):
        own = [entries.index(entry) for entry in sorted(entries) if entry[0] == row]
        rest = top_k - len(own)
        assert position[row].tolist() == own + [-1] * rest
        assert weight[row].tolist() == [weights[i] for i in own] + [0.0] * rest


@given(st.lists(st.integers(-2, 5)), st.integers(1, 4), st.sampled_from([np.int32, np.int64]))
def test_rows_by_the_rank_that_they_came_from(source, world_size, dtype):
    order, counts = order_by_source(np.array(source, dtype), world_size)
    assert order.tolist() == [i for _, i in sorted((s, i) for i, s in enumerate(source) if 0 <= s < world_size)]
    assert counts.tolist() == [source.count(rank) for rank in range(world_size)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: rows_of_tokens(np.array([[1]]), np.array([3]), np.array([0]), 3),
        lambda: rows_of_tokens(np.array([[1]]), np.array([-1]), np.array([0]), 3),
        lambda: rows_of_tokens(np.array([[2]]), np.array([1]), np.array([0]), 3),
        lambda: rows_of_tokens(np.array([[1]]), np.array([1]), np.array([0, 1]), 3),
        lambda: rows_of_tokens(np.array([[2], [-1]]), np.array([1]), np.array([0]), 3),
        lambda: positions_returned(
            np.array([[1]]), np.array([[1]]), np.array([1]), np.array([2]), np.zeros((2, 2), np.int64)
        ),
        lambda: positions_returned(
            np.array([[1]]), np.array([[1]]), np.array([-1]), np.array([1]), np.zeros((2, 2), np.int64)
        ),
        lambda: rows_of_sums(np.array([2]), np.array([0]), np.ones(1), np.zeros((2, 2), np.int64), np.zeros((2, 2))),
        lambda: rows_of_sums(np.array([0]), np.array([2]), np.ones(1), np.zeros((2, 2), np.int64), np.zeros((2, 2))),
        lambda: order_received(np.array([[2]]), np.array([0]), np.zeros((1, 3), np.int32)),
        lambda: order_received(np.array([[2], [-1]]), np.array([0, 0]), np.zeros((1, 3), np.int32)),
        lambda: order_received(np.array([[0], [1]]), np.array([0]), np.zeros((1, 3), np.int32)),
        lambda: order_received(np.array([[1]]), np.array([0]), np.zeros((1, 2), np.int32)),
    ],
)
def test_what_leads_outside_an_array_is_an_error(call):
    """Compiled code does not look at bounds by itself: it would write to memory of others."""
    with pytest.raises(IndexError):
        call()
