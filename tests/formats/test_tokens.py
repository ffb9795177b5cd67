"""Requests' tokens become a load and a trace: every number by plain loops, whatever the requests' sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.formats.contents import ReadOptions
from evenmoe.formats.document import Document
from evenmoe.formats.tokens import distinct, raw_of_requests


@given(data=st.data())
def test_distinct_is_what_sets_say(data):
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4)))
    ids = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 5, shape)
    assert distinct(ids).tolist() == [[len(set(row)) == len(row) for row in token] for token in ids.tolist()]


def test_distinct_goes_on_beyond_what_is_sorted_at_once():
    ids = np.tile([[0, 1]], (9000, 1, 1))
    ids[[4095, 4096, 8999]] = 7
    assert np.flatnonzero(~distinct(ids)[:, 0]).tolist() == [4095, 4096, 8999]


@given(data=st.data())
def test_good_tokens_are_counted_and_kept_in_order(data):
    """Among requests of any length, empty ones too, with holes of every kind."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lengths = [1, *data.draw(st.lists(st.integers(0, 5), max_size=6))]
    layers, experts, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 9)), data.draw(st.integers(2, 3))
    ids = np.argsort(rng.random((sum(lengths), layers, experts)), axis=2)[:, :, :top_k]
    for token in range(1, len(ids)):
        ids[token] = {1: 0, 2: -1, 3: np.where(ids[token] == ids[token, 0, 0], ids[token, 0, 1], ids[token])}.get(
            int(rng.integers(0, 8)), ids[token]
        )
    ends = np.cumsum(lengths)
    requests = [(str(n), ids[end - length : end]) for n, (length, end) in enumerate(zip(lengths, ends, strict=True))]
    raw = raw_of_requests(Document("x", "npz", None), requests, ReadOptions(num_experts=experts), "a server")

    kept, load = [], []
    for _, request in requests:
        good = [t for t in request.tolist() if all(min(row) >= 0 and len(set(row)) == top_k for row in t)]
        if good:
            load.append(
                [[sum(row.count(e) for row in rows) for e in range(experts)] for rows in zip(*good, strict=True)]
            )
            kept.append(good)
    assert raw.load.tolist() == load
    assert raw.trace is not None
    assert raw.trace.routing is not None
    assert raw.trace.seq_start is not None
    assert raw.trace.routing.tolist() == [token for request in kept for token in request]
    assert np.diff(raw.trace.seq_start).tolist() == [len(request) for request in kept]
