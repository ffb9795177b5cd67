"""Messages between ranks that read each other's memory: what is packed for a rank is what that rank unpacks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.transport.agreement import HEADER
from evenmoe.transport.messages import open_messages, pack

WORLDS = st.integers(1, 4).flatmap(
    lambda world_size: st.tuples(
        st.integers(0, 3),
        st.lists(
            st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=world_size, max_size=world_size),
            min_size=world_size,
            max_size=world_size,
        ),
    )
)


def addresses(arrays):
    return np.array([array.ctypes.data for array in arrays])


@given(WORLDS)
def test_every_rank_unpacks_what_the_others_packed_for_it(world):
    width, sizes = world
    world_size, random = len(sizes), np.random.default_rng(0)
    sent, parts = [], []
    for of_source in sizes:
        rows, along = [r for r, _ in of_source], [n for _, n in of_source]
        header = random.integers(0, 99, HEADER)
        counts = random.integers(0, 99, (world_size, width))
        index, numbers = random.integers(0, 99, sum(rows)), random.integers(0, 99, sum(along)).astype(np.int32)
        message, lengths = pack(header, counts, index, rows, numbers, along, shown=99)
        assert (lengths % 8 == 0).all()
        assert len(message) == lengths.sum()
        parts.append(np.split(message, lengths.cumsum()[:-1]))
        sent.append((header, counts, np.split(index, np.cumsum(rows)[:-1]), np.split(numbers, np.cumsum(along)[:-1])))
    for rank in range(world_size):
        came = [parts[source][rank] for source in range(world_size)]
        opened = open_messages(addresses(came), sent[rank][0])
        assert opened.differ == (world_size > 1)
        assert (opened.headers == [header for header, *_ in sent]).all()
        told = opened.unpack()
        assert told.counts.tolist() == [counts[rank].tolist() for _, counts, _, _ in sent]
        assert told.rows.tolist() == [of_source[rank][0] for of_source in sizes]
        assert told.at.tolist() == [i for _, _, index, _ in sent for i in index[rank].tolist()]
        assert told.numbers.tolist() == [n for *_, numbers in sent for n in numbers[rank].tolist()]


def test_a_failed_rank_sends_its_header_alone():
    header = np.arange(HEADER)
    message, lengths = pack(header, np.zeros((2, 0), np.int64))
    assert lengths.tolist() == [8 * (HEADER + 3)] * 2
    opened = open_messages(addresses(np.split(message, 2)), header)
    assert not opened.differ
    assert (opened.headers == header).all()
    assert opened.unpack().rows.tolist() == [0, 0]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_of_no_row_is_an_error(index):
    with pytest.raises(IndexError, match="a row that is not shown"):
        pack(np.arange(HEADER), np.zeros((1, 0), np.int64), np.array([index]), [1], along=[0], shown=3)
