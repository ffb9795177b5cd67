"""The headline beside an engine's own balancer, in words; tests/cli/test_headline_by_hand.py recomputes the figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.engines import ENGINES
from evenmoe.simulator.beside_own import BesideOwn
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.result import Simulation
from tests.simulator.test_headline import SKEWED, routed, run

SGLANG, VLLM = (EngineView.of(ENGINES.get(name)) for name in ("sglang", "vllm"))


@pytest.mark.parametrize(
    ("gain", "engine", "text"),
    [
        ((2.06, 0.31, 3.8), SGLANG,
         "Against sglang's own balancer, own (+9.0 %), mine takes 2.1 % less time a step, copying included (at least "
         "0.3 %)."),
        ((-2.0, -3.0, -1.0), SGLANG,
         "Against sglang's own balancer, own (+9.0 %), mine takes 2.0 % more time a step, copying included (at least "
         "1.0 %)."),
        ((0.5, -1.0, 2.0), SGLANG,
         "Against sglang's own balancer, own (+9.0 %), mine takes 0.5 % less time a step, copying included, which may "
         "be chance."),
        ((-0.5, -1.0, 2.0), VLLM,
         "Against vllm's own balancer, own (+9.0 %), mine would take 0.5 % more time a step, copying included, which "
         "may be chance; but vLLM 0.33.0 starts from no placement in a file."),
    ],
)  # fmt: skip
def test_sentences(gain, engine, text):
    assert BesideOwn("own", 9.0, "mine", *gain).words(engine) == text


def test_an_own_balancer_alone():
    found = BesideOwn("own:slots=16", -1.0, None, None, None, None)
    assert found.words(SGLANG) == "sglang's own balancer, own:slots=16, comes to \u22121.0 %."


def headline(simulation: Simulation):
    return simulation.summary.headline


def test_the_own_balancer_comes_first_where_nothing_is_better():
    """Both planners spread four busy experts over four ranks."""
    trace = routed(np.r_[6.0, 6, 6, 6, np.ones(12)])
    said = headline(run(trace, ["evenmoe:slots=16", "own:slots=16"], engine="sglang"))
    assert said.policy == "own:slots=16"
    assert said.sentence.startswith(
        "Under sglang's own rule (even), with its own balancer (own:slots=16) a step takes "
    )
    assert " Against sglang's own balancer, own:slots=16 (+" in said.sentence
    assert said.beside_own is not None
    assert (said.beside_own.own_policy, said.beside_own.policy) == ("own:slots=16", "evenmoe:slots=16")
    assert said.details == (
        "own:slots=16 is what sglang does by itself (--enable-eplb with --eplb-algorithm deepseek), with 0 redundant "
        "experts.",
    )
    assert "sglang's own balancer (--enable-eplb with --eplb-algorithm deepseek) plans every 1,000 " in said.measured_on


def test_what_the_engine_cannot_run_is_not_recommended():
    simulation = run(routed(SKEWED), ["evenmoe:rule=batch", "evenmoe:slots=16"], engine="sglang")
    said = headline(simulation)
    assert said.policy == said.engine_policy == said.fastest_policy == "evenmoe:slots=16"
    assert simulation.policies[1].step_time[20:].mean() < simulation.policies[2].step_time[20:].mean()
    assert said.beside_own is None
    assert said.details[0].startswith("sglang's own balancer was not replayed: it is `own` among the policies of ")
    assert said.details[-1].startswith("To get the placement: evenmoe plan LOAD --ranks 4 --slots 16 --for sglang -o ")


def test_an_engine_that_can_run_none_of_them():
    said = headline(run(routed(SKEWED), ["evenmoe:rule=batch"], engine="sglang"))
    assert said.kind == "nothing compared"
    assert said.sentence.startswith(
        "Of what was replayed sglang can run identity alone, so there is nothing to compare it with; its mean PAR is "
    )


def test_nothing_is_said_of_balancers_where_nothing_is_judged():
    said = headline(run(routed(SKEWED, steps=1), engine="vllm"))
    assert said.beside_own is None
    assert said.sentence.startswith("Under vllm's own rule (token), too little to judge: 128 tokens make 1 step of 128")


def test_a_replay_may_be_looked_at_for_another_engine():
    simulation = run(routed(SKEWED), ["own", "evenmoe:slots=16", "evenmoe:rule=token"], engine="vllm")
    assert [policy.cannot_run for policy in simulation.summary.policies] == [
        None, None, "loads no file", "loads no file",
    ]  # fmt: skip
    other = simulation.seen_for("sglang")
    assert other.summary.engine == SGLANG
    assert [policy.cannot_run for policy in other.summary.policies] == [None, "token rule", None, "token rule"]
    assert headline(other).policy == "evenmoe:slots=16"
    assert simulation.seen_for("vllm").summary == simulation.summary
    assert replace(other, engine=None).summary.headline.beside_own is None
    assert "On sglang" in other._repr_html_()
    assert "no: token rule" in other._repr_html_()
