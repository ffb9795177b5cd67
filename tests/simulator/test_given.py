"""Policies that are objects: each does what the same policy as a text does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError, MissingArgumentError, UnsupportedTypeError
from evenmoe.rules import RULES
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.given import parse_policies
from evenmoe.traces.models import find_model, shape_of
from evenmoe.traces.synthesis import small_trace

WORLD = {"num_ranks": 4, "num_nodes": 2, "tokens_per_rank": 16, "num_slots": 40, "num_steps": 6, "refresh": 2}
SAME = "evenmoe:start=scratch,plan-for=even"  # plans as `my_plan` does
COSTS = em.CostModel.for_expert(64, 4e6, 1e7)


def run(policies, trace=None, **more):
    return em.simulate(trace or small_trace(), policies, **{**WORLD, "costs": COSTS, **more})


def placement(trace=None, slots=40) -> em.Placement:
    return em.plan((trace or small_trace()).load[0], num_ranks=4, num_slots=slots)


def same(one, other) -> None:
    for name in ("par", "rank_tokens", "copies", "step_time", "copy_time"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.final == other.final


def my_plan(load, *, num_ranks, num_slots):
    return em.plan(load, num_ranks=num_ranks, num_slots=num_slots)


def test_a_dict_names_policies():
    found = run({"fixed": placement(), "mine": my_plan, "as a text": SAME}).policies
    assert [policy.name for policy in found] == ["identity", "fixed", "mine", "as a text"]
    same(found[2], found[3])
    assert found[1].description == "The given placement for ever, replicas chosen by the rank rule."
    assert found[2].description.startswith("The plan of my_plan on 40 slots, made every 2 steps")


def test_a_placement_serves_from_the_first_step_on():
    fixed = placement()
    found = run([fixed]).policies[1]
    assert found.name == "placement"
    assert found.initial == found.final == fixed
    assert not found.copies.any()
    expected = fixed.slot_to_expert.shape[1] // 4 * fixed.num_layers * 4e6
    assert found.memory_per_rank == round(expected)


def test_a_planner_and_a_rule_may_be_objects():
    rule = RULES.get("occurrence")
    _, mine, text, by_rule, by_text = run([my_plan, SAME, rule, "evenmoe:rule=even"]).policies
    assert (mine.name, by_rule.name) == ("my_plan", "evenmoe:rule=occurrence")
    same(mine, text)
    assert by_rule.rule == "occurrence"
    same(by_rule, run(["evenmoe:rule=occurrence"]).policies[1])
    assert by_text.rule == "even"


def test_what_sees_the_future_keeps_the_word():
    simulation = run({"best possible": "oracle", "oracle:greedy": "oracle:planner=greedy"})
    assert [policy.name for policy in simulation.policies[1:]] == ["oracle: best possible", "oracle:greedy"]
    assert all(policy.sees_future for policy in simulation.summary.policies[1:])


def test_a_name_in_a_text_may_be_a_placement_a_rule_or_a_planner(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import evenmoe as em\n"
        "from evenmoe.rules import RULES\n"
        "from evenmoe.simulator.batches import Cluster\n"
        "from evenmoe.traces.synthesis import small_trace\n"
        "HELD = em.plan(small_trace().load[0], num_ranks=4, num_slots=40)\n"
        "RULE = RULES.get('token')\n"
        "def plan(load, *, num_ranks, num_slots):\n"
        "    return em.plan(load, num_ranks=num_ranks, num_slots=num_slots)\n"
    )
    monkeypatch.chdir(tmp_path)
    texts = ["py:own.py:HELD", "py:own.py:HELD:rule=batch", "py:own.py:RULE", "py:own.py:plan:refresh=2"]
    found = run([*texts, "evenmoe:rule=token", SAME]).policies[1:]
    assert [policy.name for policy in found[:4]] == texts
    assert [policy.rule for policy in found[:4]] == ["rank", "batch", "token", "rank"]
    assert found[0].final == found[1].final == placement()
    same(found[2], found[4])
    same(found[3], found[5])
    with pytest.raises(ConstraintError, match=r"has 'slots', which py:own\.py:HELD does not take; use rule"):
        run(["py:own.py:HELD:slots=40"])
    with pytest.raises(ConstraintError, match=r"`policy` is 'py:own\.py:gone': it must be importable, and is not"):
        run(["py:own.py:gone"])


def test_a_policy_object_is_taken_as_it_is():
    first, second = parse_policies(["greedy"], Cluster(4, 2, 16), num_experts=32, num_slots=40, refresh=2, window=2)
    assert parse_policies([first, second], Cluster(4), num_experts=32, num_slots=64, refresh=9, window=9) == (
        first,
        second,
    )


@pytest.mark.parametrize(
    ("policies", "error", "words"),
    [
        ({"": "greedy"}, ConstraintError, "a dict with '': it must name each policy; use texts as keys."),
        ({1: "greedy"}, ConstraintError, "a dict with 1: it must name each policy; use texts as keys."),
        (
            [None],
            UnsupportedTypeError,
            "with something of type NoneType: it must hold texts, placements",
        ),
        ([em.Placement], UnsupportedTypeError, "with <class 'evenmoe.placement.Placement'>: it must hold texts"),
        (42, ConstraintError, "of type int: it must be a sequence or a dict of policies; put each policy in a list."),
        (my_plan, ConstraintError, "of type function: it must be a sequence or a dict"),
        (
            [my_plan, my_plan],
            ConstraintError,
            "'my_plan': it must be given once; change an option, leave one",
        ),
    ],
)
def test_what_is_no_policy_is_said(policies, error, words):
    with pytest.raises(error) as caught:
        run(policies)
    assert words in str(caught.value)


def test_costs_are_those_of_the_model_by_default():
    trace = em.synthesize("mixtral-8x7b", num_windows=3, tokens_per_window=64)
    world = {"num_ranks": 4, "tokens_per_rank": 16, "num_steps": 3}
    named = em.simulate(trace, ["identity"], costs=em.CostModel.for_model("mixtral-8x7b"), **world)
    for costs in (None, "mixtral-8x7b", find_model("mixtral-8x7b")):
        same(em.simulate(trace, ["identity"], costs=costs, **world).policies[0], named.policies[0])
    bare = em.Trace("bare", trace.load)
    assert shape_of(bare) == find_model("mixtral-8x7b")  # the only one of its sizes
    assert em.simulate(bare, ["identity"], **world).top_k == 2
    with pytest.raises(MissingArgumentError) as caught:
        em.simulate(dataclasses.replace(bare, load=bare.load[:, :3]), ["identity"], **world)
    assert str(caught.value).startswith(
        "`costs` is not given, and the trace is of no known model: it must say what experts and rows cost; "
        "name a model (deep"
    )
    with pytest.raises(ConstraintError, match="mixtrel"):
        em.simulate(bare, ["identity"], costs="mixtrel", **world)
