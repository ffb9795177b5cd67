"""The first message of every collective: headers that are compared, counts of any width, messages that are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError
from evenmoe.transport import agreement
from evenmoe.transport.agreement import Header
from evenmoe.transport.call import GroupCall
from evenmoe.transport.world import Rank

SIZES = {"hidden size of `x`": 7, "dtype of the rows": 2, "tokens per rank times ranks (`global_bs`)": 8}
SIZES |= {"expert parallel rank": 3}
OPERATOR = "tensor-parallel step of dispatch"


def exchange(rank: Rank, width: int) -> bool:
    size = rank.ep.world_size
    values = torch.arange(width)
    mine = torch.stack([1_000_000 * rank.index + 10_000 * d + values for d in range(size)]) if width else None
    mine = torch.zeros((size, 0), dtype=torch.int64) if mine is None else mine
    received = GroupCall(rank.ep, OPERATOR).agree(Header(OPERATOR, SIZES), mine)
    expected = torch.stack([1_000_000 * s + 10_000 * rank.index + values for s in range(size)])
    return torch.equal(received, expected.long())


@pytest.mark.parametrize("width", [0, 1, 1023, 1024, 1025, 5000])
def test_counts_of_any_width(processes, width):
    """4096 / 4 counts for each rank fit into the first message; what does not fit follows in a second one."""
    with em.local_world(4, timeout_s=60.0) as world:
        assert world.run(lambda rank: exchange(rank, width)) == [True] * 4
    assert processes.run((4, 1), exchange, width) == [True] * 4


def test_sixty_four_ranks_with_many_experts_each():
    """64 counts fit at least, however many ranks there are; here every rank has 100 experts."""
    with em.local_world(64, timeout_s=60.0) as world:
        assert all(world.run(lambda rank: exchange(rank, 100)))


def test_every_operator_fits_into_the_header():
    for names in agreement.OPERATORS.values():
        assert len(names) <= agreement.FIELDS
        assert len(set(names)) == len(names)


LONG = "ä€" * 200


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 20))
def test_a_long_error_is_cut_even_within_a_character(cut):
    """320 bytes travel; ä takes two of them and € three."""
    told: list[str] = []

    def step(rank: Rank) -> None:
        if rank.index == 1:
            error = ConstraintError("x", "y" * cut, LONG, "shorten it")
            GroupCall(rank.ep, "dispatch").fail(error)
            return
        try:
            GroupCall(rank.ep, OPERATOR).agree(Header(OPERATOR, SIZES), torch.zeros((2, 1), dtype=torch.int64))
        except RankDisagreementError as error:
            told.append(str(error))

    with em.local_world(2, timeout_s=60.0) as world:
        world.run(step)
    start = f"`the call of dispatch on rank 1` is refused there (`x` is {'y' * cut}: it ä€ä€ä€"
    assert told[0].startswith(start)
    assert told[0].endswith("): it must be accepted on every rank; correct the arguments of rank 1.")
    inner = told[0][told[0].index("(") + 1 : told[0].rindex(")")]
    whole = f"`x` is {'y' * cut}: it {LONG}"
    assert whole.startswith(inner.rstrip("�"))
    assert 315 < len(inner.rstrip("�").encode()) <= 320


def test_the_most_common_value_comes_first():
    words = {0: "7", 1: "9", 2: "9", 3: "8", 4: "9"}
    assert agreement.by_value(words) == "9 on ranks 1, 2, 4 and 7 on rank 0 and 8 on rank 3"


def test_dtypes_are_told_apart():
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
    assert len({agreement.dtype_code(kind) for kind in kinds}) == len(kinds)
    other = agreement.dtype_code(torch.complex64)
    assert agreement._readable("dtype of `x`", other, {}) == "another dtype"


def test_digests_tell_order_and_length_apart():
    values = [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (2**40,)]
    assert len({agreement.digest(v) for v in values}) == len(values)
    assert agreement.digest((1, 2)) == agreement.digest(iter([1, 2]))
