"""dispatch, combine and combine_add_rms_norm over real ranks give the reference's bits, on random worlds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.transport.world import Rank
from tests.lagging import let_lag
from tests.processes import TRANSPORTS
from tests.worlds import Case, Spec, assert_equal_worlds, run_rank, run_reference, specs


def run_in_threads(spec: Spec) -> list:
    case = Case(spec)
    with em.local_world(spec.ep, max(spec.tp, 1), timeout_s=60.0) as world:
        return world.run(lambda rank: run_rank(rank, case))


@settings(max_examples=150, deadline=None)
@given(specs())
def test_threads(spec):
    assert_equal_worlds(run_in_threads(spec), run_reference(Case(spec)))


@settings(max_examples=60, deadline=None)
@given(specs(elastic=True))
def test_threads_with_ranks_that_are_gone(spec):
    assert_equal_worlds(run_in_threads(spec), run_reference(Case(spec)))


@settings(max_examples=25, deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_threads_that_lag(spec, random):
    """Every input is overwritten as soon as its call has returned, while slower ranks still read."""
    case = Case(spec)
    with em.local_world(spec.ep, max(spec.tp, 1), timeout_s=60.0) as world:
        for rank in world.ranks:
            let_lag(rank.ep, random.choice([0.0, 0.001, 0.004]))
            let_lag(rank.tp, random.choice([0.0, 0.001, 0.004]))
        results = world.run(lambda rank: run_rank(rank, case))
    assert_equal_worlds(results, run_reference(Case(spec)))


def in_process(rank: Rank, spec: Spec) -> tuple | None:
    return run_rank(rank, Case(spec))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("ep", "tp"), [(4, 1), (2, 2)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_processes(processes, transport, ep, tp, data):
    spec = data.draw(specs(ep=ep, tp=tp))
    results = processes.run((ep, tp), in_process, spec, transport=transport)
    assert_equal_worlds(results, run_reference(Case(spec)))


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(max_examples=30, deadline=None)
@given(spec=specs(ep=4, tp=0, elastic=True))
def test_processes_with_ranks_that_are_gone(processes, transport, spec):
    results = processes.run((4, 1), in_process, spec, transport=transport)
    assert_equal_worlds(results, run_reference(Case(spec)))
