"""The published greedy planner, against its description followed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.planner.greedy import plan_greedy
from tests.simulator.plain_loops import Setup, greedy


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 3))
def test_greedy_is_the_published_one(ranks, width, seed, spread):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, ranks * width + 1))
    load = np.floor(rng.exponential(size=(2, experts)) ** spread * 10)
    slots = plan_greedy(load, num_ranks=ranks, num_slots=ranks * width).slot_to_expert
    setup = Setup(ranks, 1, 1, 1, 1, 1, 1, ranks * width, 0, 0, 0)
    assert slots.tolist() == [greedy(layer.tolist(), setup, ranks * width) for layer in load]


def test_greedy_keeps_groups_inside_nodes():
    rng = np.random.default_rng(0)
    load = rng.exponential(size=(3, 16)) ** 2
    slots = plan_greedy(load, num_ranks=4, num_slots=24, num_nodes=2, num_groups=8).slot_to_expert
    for layer in slots.reshape(3, 2, 12):
        groups = [set((node // 2).tolist()) for node in layer]
        assert len(groups[0]) == len(groups[1]) == 4
        assert not groups[0] & groups[1]
        assert set(layer.ravel().tolist()) == set(range(16))


def test_greedy_adds_windows_up():
    windows = np.random.default_rng(1).exponential(size=(3, 2, 16))
    shape = {"num_ranks": 4, "num_slots": 20}
    assert plan_greedy(windows, **shape) == plan_greedy(windows.sum(axis=0), **shape)


def test_greedy_refuses_what_the_plan_refuses():
    with pytest.raises(ConstraintError, match="the nearest that work are 16 and 20"):
        plan_greedy(np.ones((2, 16)), num_ranks=4, num_slots=18)
