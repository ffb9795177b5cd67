"""The kernel model by hand, and what holds for any constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.costs import KernelModel

FIGURES = st.floats(1e-3, 1e3)


def by_hand(model: KernelModel, rows: list[int], size: float, flops: float, tokens: float) -> float:
    """Microseconds of one rank in scalars, from the rows of its slots."""
    if not any(rows):
        return 0.0
    read = sum(1 for number in rows if number) * size / model.memory_bytes_per_s * 1e6
    compute = sum(math.ceil(number / model.tile) * model.tile for number in rows) * flops / model.flops_per_s * 1e6
    both = (read**model.norm + compute**model.norm) ** (1 / model.norm)
    work = model.start_us + model.slot_us * len(rows) ** 0.8 + both + model.token_us * tokens
    return (model.floor_us**8 + work**8) ** 0.125


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9),
    st.builds(
        KernelModel,
        memory_bytes_per_s=FIGURES,
        flops_per_s=FIGURES,
        start_us=FIGURES,
        slot_us=FIGURES,
        floor_us=FIGURES,
        token_us=FIGURES,
        norm=st.sampled_from([1.0, 1.2, 2.0, 3.0]),
        tile=st.sampled_from([1, 3, 64, 128]),
    ),
    FIGURES,
    FIGURES,
    st.integers(0, 100),
)
def test_one_rank_by_hand(rows, model, size, flops, tokens):
    padded, active = model.padded(rows).sum(), np.count_nonzero(rows)
    found = float(model.time_us(padded, active, len(rows), size, flops, tokens))
    # About 20 roundings of positive terms, and powers of at most 8, each of which is right to a few units.
    assert found == pytest.approx(by_hand(model, rows, size, flops, tokens), rel=200 * 2**-52)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=9), st.integers(0, 8))
def test_more_rows_never_take_less(rows, which):
    model = KernelModel(3e12, 1e15, start_us=20.0, slot_us=1.0)
    more = list(rows)
    more[which % len(rows)] += 1
    before, after = (
        float(model.time_us(model.padded(each).sum(), np.count_nonzero(each), len(each), 4e7, 8e7))
        for each in (rows, more)
    )
    # The norm divides by the larger of its two, so its two branches may differ in the last bits.
    assert after >= before * (1 - 8 * 2**-52)


def test_a_norm_without_end_is_the_longer_of_the_two():
    model = KernelModel(1e6, 1e6, norm=math.inf, tile=1)
    assert model.time_us([3.0, 30.0], [1, 1], 1, 7.0, 1.0).tolist() == [7.0, 30.0]
    assert model.time_us(0, 0, 4, 7.0, 1.0) == 0.0
