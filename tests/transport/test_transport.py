"""The properties of `transport/transport.py`, the same for every implementation.

Rows are random bytes seen as whatever dtype is asked for, so that every bit pattern travels. What a rank must receive
follows from the seeds alone: rank s makes the rows that it sends from seed s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.transport.process_group import RemappedTransport
from evenmoe.transport.transport import Transport
from evenmoe.transport.world import LocalTransport, Rank
from tests.lagging import let_lag
from tests.processes import TRANSPORTS

DTYPES = ["uint8", "int8", "bool", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]
SIZE = 4
Run = Callable[..., list]


def run_in_threads(job: Callable[..., Any], *arguments: object) -> list:
    with em.local_world(SIZE, timeout_s=60.0) as world:
        return world.run(lambda rank: job(rank, *arguments))


@pytest.fixture(scope="module", params=["local", *TRANSPORTS])
def run(request: pytest.FixtureRequest, processes: Any) -> Run:
    """run(job, *arguments): the results of four ranks of one implementation. The next implementation goes here."""

    def run_in_processes(job: Callable[..., Any], *arguments: object) -> list:
        results = processes.run((SIZE, 1), job, *arguments, transport=request.param)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    return run_in_threads if request.param == "local" else run_in_processes


def make_rows(seed: int, count: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Random bytes as (count, *shape) of `dtype`; bool takes 0 and 1 only."""
    kind: torch.dtype = getattr(torch, dtype)
    random = torch.Generator().manual_seed(seed)
    width = prod(shape) * kind.itemsize
    values = torch.randint(0, 2 if dtype == "bool" else 256, (count, width), dtype=torch.uint8, generator=random)
    return values.view(-1).view(kind).view(count, *shape)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def send_and_check(
    transport: Transport,
    counts: list[list[int]],
    shape: Sequence[int],
    dtype: str,
    seed: int = 0,
    members: list[int] | None = None,
) -> bool:
    """Exchange counts[s][d] rows from every rank s to every rank d; True if each arrived where and as it should."""
    me = transport.rank
    mine = make_rows(seed + me, sum(counts[me]), shape, dtype)
    kept = mine.clone()
    received = transport.exchange_rows(mine, counts[me], [row[me] for row in counts], members)
    expected = []
    for source, row in enumerate(counts):
        start = sum(row[:me])
        expected.append(make_rows(seed + source, sum(row), shape, dtype)[start : start + row[me]])
    return same(received, torch.cat(expected)) and same(mine, kept)


def send_to_each(rank: Rank, *arguments: Any) -> bool:
    return send_and_check(rank.ep, *arguments)


COUNTS = st.lists(st.lists(st.integers(0, 5), min_size=SIZE, max_size=SIZE), min_size=SIZE, max_size=SIZE)


@settings(max_examples=40, deadline=None)
@given(
    counts=COUNTS,
    shape=st.sampled_from([(), (1,), (3,), (7, 2), (0,), (2, 0)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_rows_arrive_unchanged_ordered_by_source(run, counts, shape, dtype, seed):
    assert run(send_to_each, counts, shape, dtype, seed) == [True] * SIZE


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(run, dtype):
    counts = [[(s + 2 * d) % 4 for d in range(SIZE)] for s in range(SIZE)]
    assert run(send_to_each, counts, (3,), dtype) == [True] * SIZE


@pytest.mark.parametrize(
    "counts",
    [
        [[0] * SIZE] * SIZE,
        [[9, 0, 0, 0]] * SIZE,  # everything to one rank
        [[0] * SIZE, [3, 5, 0, 7], [0] * SIZE, [0] * SIZE],  # everything from one rank
        [[7 if s == d else 0 for d in range(SIZE)] for s in range(SIZE)],  # everybody to itself
    ],
)
def test_lopsided_exchanges(run, counts):
    assert run(send_to_each, counts, (5,), "bfloat16") == [True] * SIZE


def send_odd_strides(rank: Rank) -> bool:
    """Contiguous in memory, with the strides of what they were cut from: no row at all, or a single column."""
    transport = rank.ep
    empty = torch.zeros(6, 8).T[:, ::2][:0]
    column = torch.arange(4.0).view(1, 4).T + transport.rank
    column = column.as_strided((4, 1), (1, 9))
    assert empty.is_contiguous()
    assert column.is_contiguous()
    received = transport.exchange_rows(empty, [0] * SIZE, [0] * SIZE)
    columns = transport.exchange_rows(column, [1] * SIZE, [1] * SIZE)
    return received.shape == (0, 3) and columns[:, 0].tolist() == [s + transport.rank for s in range(SIZE)]


def test_contiguous_rows_with_odd_strides(run):
    assert run(send_odd_strides) == [True] * SIZE


def lend_and_borrow(rank: Rank) -> bool:
    """Exchanges of growing and shrinking rows, out of the transport's memory and into it, each read at once."""
    transport = rank.ep
    if isinstance(transport, LocalTransport) and transport.rank == 0:
        let_lag(transport, 0.1)  # by then the others have filled what they send next
    right = []
    for step, (each, width, dtype) in enumerate(
        [(3, 4, "float32"), (9, 40, "bfloat16"), (9, 40, "bfloat16"), (0, 4, "int8"), (1, 2, "int64")]
    ):
        mine = transport.rows_to_send((SIZE * each, width), torch.zeros(0, dtype=getattr(torch, dtype)))
        mine.copy_(make_rows(step + transport.rank, SIZE * each, (width,), dtype))
        counts = [each] * SIZE
        received = transport.exchange_rows(mine, counts, counts, reuse=True)
        me = slice(transport.rank * each, (transport.rank + 1) * each)
        expected = [make_rows(step + source, SIZE * each, (width,), dtype)[me] for source in range(SIZE)]
        right.append(same(received, torch.cat(expected)))
    return all(right)


def test_memory_that_is_used_again(run):
    assert run(lend_and_borrow) == [True] * SIZE


def transpose_counts(rank: Rank, width: int) -> bool:
    transport = rank.ep
    mine = torch.tensor([[1000 * rank.index + 10 * d + i for i in range(width)] for d in range(SIZE)])
    mine = mine.view(SIZE, width).long()
    kept = mine.clone()
    received = transport.exchange_counts(mine)
    mine.fill_(-1)  # a slower rank must not see this
    theirs = [[1000 * s + 10 * rank.index + i for i in range(width)] for s in range(SIZE)]
    strided = transport.exchange_counts(kept.T.contiguous().T)
    expected = torch.tensor(theirs).view(SIZE, width).long()
    return torch.equal(received, expected) and torch.equal(strided, expected) and received.dtype == torch.int64


@pytest.mark.parametrize("width", [0, 1, 3, 1000])
def test_counts_are_transposed(run, width):
    assert run(transpose_counts, width) == [True] * SIZE


def send_among(rank: Rank, members: list[int], counts: list[list[int]], dtype: str, seed: int) -> bool:
    if rank.index not in members:
        return True
    among = [[n if s in members and d in members else 0 for d, n in enumerate(row)] for s, row in enumerate(counts)]
    mine = torch.zeros((SIZE, 2), dtype=torch.int64)
    mine[members] = rank.index
    received = rank.ep.exchange_counts(mine, members)
    known = torch.tensor([[s, s] if s in members else [0, 0] for s in range(SIZE)])
    return torch.equal(received, known) and send_and_check(rank.ep, among, (3,), dtype, seed, members)


@settings(max_examples=25, deadline=None)
@given(
    members=st.sets(st.integers(0, SIZE - 1), min_size=1).map(sorted),
    counts=COUNTS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_some_ranks_exchange_without_the_others(run, members, counts, dtype, seed):
    assert run(send_among, members, counts, dtype, seed) == [True] * SIZE


def send_remapped(rank: Rank, old_rank_of: list[int], counts: list[list[int]], dtype: str, seed: int) -> bool:
    if rank.index not in old_rank_of:
        return True
    group = RemappedTransport(rank.ep, old_rank_of)
    size = len(old_rank_of)
    right = (group.rank, group.world_size, group.name) == (old_rank_of.index(rank.index), size, rank.ep.name)
    mine = torch.tensor([[100 * group.rank + d, 7] for d in range(size)])
    theirs = torch.tensor([[100 * s + group.rank, 7] for s in range(size)])
    right &= torch.equal(group.exchange_counts(mine), theirs)
    return right and send_and_check(group, [row[:size] for row in counts[:size]], (2,), dtype, seed)


@settings(max_examples=25, deadline=None)
@given(
    old_rank_of=st.permutations(range(SIZE)).flatmap(lambda p: st.integers(1, SIZE).map(lambda n: p[:n])),
    counts=COUNTS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_remapped_ranks(run, old_rank_of, counts, dtype, seed):
    assert run(send_remapped, old_rank_of, counts, dtype, seed) == [True] * SIZE


def exchange_many(rank: Rank, times: int) -> int:
    """Counts and rows in turn, each with its number in it, at different speeds; how many came from another exchange."""
    random, mixed = Random(rank.index), 0
    for number in range(times):
        if random.random() < 0.05:
            time.sleep(random.random() * 0.002)
        label = number * SIZE + rank.index
        if number % 2:
            received = rank.ep.exchange_counts(torch.full((SIZE, 1), label))
        else:
            received = rank.ep.exchange_rows(torch.full((SIZE, 2), label), [1] * SIZE, [1] * SIZE)
        mixed += received[:, 0].tolist() != [number * SIZE + s for s in range(SIZE)]
    return mixed


def test_exchanges_never_mix(run):
    assert run(exchange_many, 2000) == [0] * SIZE


def identify(rank: Rank) -> tuple:
    return (rank.ep.rank, rank.ep.world_size, rank.ep.name, rank.tp.rank, rank.tp.world_size, _is_transport(rank))


def _is_transport(rank: Rank) -> bool:
    return isinstance(rank.ep, Transport) and isinstance(RemappedTransport(rank.ep, [rank.ep.rank]), Transport)


def test_ranks_know_themselves(run):
    found = run(identify)
    assert [known[0] for known in found] == list(range(SIZE))
    assert {known[1] for known in found} == {SIZE}
    assert len({known[2] for known in found}) == 1
    assert all(known[3:] == (0, 1, True) for known in found)
