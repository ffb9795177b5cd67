"""When balancing is said to pay, and when it is not."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from benchmarks.advice import SHAPE, asked, null, planted
from evenmoe.advice import advise
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.traces.trace import Trace


@pytest.mark.parametrize("seed", range(6))
def test_nothing_to_gain_never_pays(seed):
    """Six of the campaign's 500 nulls (docs/advise.md): one that paid would be one of the 2 % that may."""
    found = asked(null(seed))
    assert found.kind == ("too close to call" if seed % 3 == 1 else "does not pay") or seed % 3 == 2
    assert found.kind != "pays"


@pytest.mark.parametrize("seed", range(3))
def test_a_lasting_skew_pays(seed):
    found = asked(planted(seed))
    assert (found.kind, found.reason, found.best.phase) == ("pays", "", "prefill")
    assert found.best.runs
    assert found.best.gain.lower > 0
    assert found.best.break_even_steps * (found.best.before_us - found.best.after_us) == pytest.approx(
        found.best.copy_us
    )
    # An eighth of the slots more on each of 8 ranks, in 4 layers of experts of 44 MB.
    extra = found.best.num_slots - 32
    assert found.best.memory_bytes == extra / 8 * 4 * 3 * 7168 * 2048


def test_trials_have_every_phase_size_and_slot_once():
    found = asked(planted(0))
    keys = [(t.phase, t.tokens, t.objective, t.rule, t.num_slots) for t in found.trials]
    assert len(set(keys)) == len(keys)
    assert {t.phase for t in found.trials if t.tokens > 128 * 8} == {"prefill"}
    assert {t.num_slots for t in found.trials} == {32, 40, 48}
    assert {t.rule for t in found.trials if not t.runs} == {"batch"}
    assert len({t.before_us for t in found.trials if (t.phase, t.tokens) == ("decode", 64)}) == 1


def test_the_same_arguments_give_the_same_advice():
    one, other = (asked(planted(1)) for _ in range(2))
    assert one.trials == other.trials


def test_replicas_that_are_all_read_make_decode_slower():
    found = advise(planted(0), engine="vllm", num_ranks=8, model=SHAPE, batch_sizes=[64], phases=["decode"])
    assert found.kind != "pays"
    assert max(t.gain.percent for t in found.trials if t.num_slots > 32 and t.runs) < 0


def test_what_cannot_be_is_named():
    trace = planted(0)
    with pytest.raises(MissingArgumentError, match="`model` is not given, and the trace is of no known model"):
        advise(trace, engine="vllm", num_ranks=8)
    with pytest.raises(ConstraintError, match="`model` is mixtral-8x7b, of 8 experts: it must have the trace's 32"):
        advise(trace, engine="vllm", num_ranks=8, model="mixtral-8x7b")
    with pytest.raises(ConstraintError, match="must have one of at most 128 tokens a rank to judge decode"):
        advise(trace, engine="vllm", num_ranks=2, model=SHAPE, batch_sizes=[4096], phases=["decode"])
    with pytest.raises(ConstraintError, match="`gpu` is 'V100'"):
        advise(trace, engine="vllm", num_ranks=8, model=SHAPE, gpu="V100")
    with pytest.raises(ConstraintError, match="`num_nodes` is 3: it must divide the 8 ranks evenly"):
        advise(trace, engine="vllm", num_ranks=8, model=SHAPE, num_nodes=3)
    with pytest.raises(ConstraintError, match="`phases` is 'train'"):
        advise(trace, engine="vllm", num_ranks=8, model=SHAPE, phases=["train"])  # pyright: ignore


def test_ranks_that_do_not_divide_the_experts_and_one_window():
    one = Trace("one", planted(0).load[:1])
    found = advise(one, engine="vllm", num_ranks=5, model=SHAPE, batch_sizes=[16384], phases=["prefill"])
    assert {t.num_slots for t in found.trials} == {35, 40, 45}
    assert found.held_out.unit == "assignments"
    flat = advise(
        Trace("flat", np.full((3, 4, 32), 100_000)), engine="sglang", num_ranks=4, model=replace(SHAPE, name="flat")
    )
    assert (flat.kind, flat.reason) == ("does not pay", "too balanced")


def test_more_windows_than_a_plan_takes_are_merged_not_summed(monkeypatch):
    """Single windows tell a planner what their sum does not."""
    seen = []
    module = import_module("evenmoe.advice.advise")  # the package has the function under this name

    def watched(planner, load, options):
        seen.append(np.asarray(load))
        return plan_with(planner, load, options)

    plan_with = module.plan_with
    monkeypatch.setattr(module, "plan_with", watched)
    load = np.concatenate([planted(0).load] * 5)
    advise(Trace("long", load), engine="vllm", num_ranks=8, model=SHAPE, batch_sizes=[64], phases=["prefill"])
    assert {goal.shape for goal in seen} == {(64, 4, 32)}
    assert all((goal.sum(axis=0) == load[:80].sum(axis=0)).all() for goal in seen)
