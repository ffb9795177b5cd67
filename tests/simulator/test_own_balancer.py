"""An engine's own balancer as a policy, and policies under the engine's own rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.engines import ENGINES
from evenmoe.engines.engine import Engine
from evenmoe.engines.modulo import RULE as MODULO
from evenmoe.errors import ConstraintError
from evenmoe.planner.judging import without_order
from evenmoe.rules import RULES
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.given import parse_policies
from evenmoe.simulator.own_balancer import OwnBalancer, policies_for
from evenmoe.simulator.policies import Planned
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.schedule import make_schedule
from evenmoe.traces.synthesis import small_trace
from tests.simulator.test_replay import COSTS

CLUSTER = Cluster(8, 2, 16)


def parse(engine: str | Engine | None, *texts: str):
    engine = None if engine is None else ENGINES.get(engine)
    return parse_policies(
        texts, CLUSTER, num_experts=20, num_slots=32, num_groups=4, refresh=3000, window=7, first=7, engine=engine
    )[1:]


def replayed(policies=None, **options):
    options = {"num_ranks": 8, "tokens_per_rank": 4, "workers": 1, "engine": QUICK} | options
    return simulate(small_trace(), policies, costs=COSTS, **options)


#: vLLM, at a pace that a short trace shows.
QUICK = replace(ENGINES.get("vllm"), window=5, interval=12)


def test_it_is_the_engines_planner_at_its_own_interval_under_its_own_rule():
    own, slots = parse("vllm", "own", "own:slots=24,groups=1")
    assert isinstance(own, OwnBalancer)
    assert (own.rule, own.planner, own.window, own.first, own.refresh) == (RULES.get("token"), "greedy", 1000, 7, 3000)
    assert (own.num_slots, own.num_groups, own.own_of) == (32, 4, "vllm")
    assert (slots.num_slots, slots.num_groups) == (24, 1)
    assert own.description == (
        "vllm's own balancer (policy default; replayed as the greedy planner) on 32 slots with 4 groups kept inside "
        "nodes, which plans every 3,000 steps from the last 1,000, here from step 7 on, replicas chosen by the token "
        "rule."
    )


def test_one_that_plans_once_does_so_for_ever():
    (own,) = parse("mindie", "own")
    assert [step for step in range(9000) if own.is_due(step)] == [7]


def test_a_replay_is_that_of_the_planner_at_that_interval():
    found = replayed(["own", "greedy:rule=token,window=5,refresh=12"], window=12)
    own, same = found.policies[1:]
    assert own.refreshes.tolist() == same.refreshes.tolist() == [12, 24, 36, 48, 60]
    for name in ("par", "step_time", "copy_time", "copies"):
        np.testing.assert_array_equal(getattr(own, name), getattr(same, name))
    assert (own.own_of, same.own_of) == ("vllm", "")


def test_policies_that_do_not_say_have_the_engines_rule():
    names = ("evenmoe", "greedy", "static", "oracle", "evenmoe:rule=rank", "oracle:rule=batch", "static:plan-for=even")
    found = dict(zip(names, parse("vllm-ascend", *names), strict=True))
    assert [found[name].rule for name in names] == [MODULO] * 4 + [RULES.get("rank"), RULES.get("batch"), MODULO]
    wanted = {"evenmoe": MODULO, "oracle": MODULO, "evenmoe:rule=rank": "rank", "oracle:rule=batch": "even"}
    for name, rule in {**wanted, "static:plan-for=even": "even"}.items():
        policy = found[name]
        assert isinstance(policy, Planned)
        assert policy.plan_for == rule
    baseline = parse_policies(
        [], CLUSTER, num_experts=20, num_slots=32, refresh=9, window=7, engine=ENGINES.get("sglang")
    )[0]
    assert baseline.rule is RULES.get("even")


@pytest.mark.parametrize("name", ["mindie", "evenmoe"])
def test_replicas_are_in_the_order_that_the_engines_file_has(name):
    (policy,) = parse(name, "evenmoe:rule=rank")
    past = np.random.default_rng(0).poisson(40 / np.arange(1, 21), (3, 4, 20)).astype(np.float64)
    plan = policy.plan(CLUSTER, past, None, 0)
    ordered = plan == without_order(plan)
    assert ordered == (name == "mindie")


def test_an_engine_must_be_named():
    with pytest.raises(ConstraintError) as error:
        parse(None, "own")
    assert str(error.value) == (
        "`policy` is 'own': it must follow NAME[:key=value,...], and begins with 'own', an engine's own balancer; say "
        "for which engine (engine=)."
    )
    with pytest.raises(ConstraintError, match="has 'rule', which own does not take; use slots, groups"):
        parse("vllm", "own:rule=rank")
    with pytest.raises(ConstraintError, match="`engine` is 'x': it must be one of sglang, vllm"):
        replayed(engine="x")


def test_the_schedule_is_the_engines():
    once, often = (
        make_schedule(60, None, None, None, True, ENGINES.get("mindie")),
        make_schedule(60, None, None, None, True, ENGINES.get("sglang")),
    )
    assert (once.first, once.refresh, once.horizon, once.why) == (20, 3000, 3000, "the horizon")
    assert (often.first, often.refresh, often.horizon, often.why) == (20, 1000, 1000, "sglang's own interval")
    given = make_schedule(60, 5, None, 50, True, ENGINES.get("sglang"))
    assert (given.first, given.refresh, given.horizon, given.why) == (5, 5, 50, "given")


def test_what_is_compared_where_nobody_says():
    assert policies_for(ENGINES.get("sglang"), 40, 32) == (
        "identity", "own:slots=32", "own", "evenmoe:slots=32", "evenmoe", "evenmoe:rule=occurrence",
        "evenmoe:rule=batch", "oracle",
    )  # fmt: skip
    assert policies_for(ENGINES.get("tensorrt-llm"), 32, 32) == (
        "identity", "own", "evenmoe", "evenmoe:rule=batch", "oracle",
    )  # fmt: skip


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_is_replayed(name):
    found = replayed(engine=name, num_slots=40).summary
    assert [policy.name for policy in found.policies] == list(policies_for(ENGINES.get(name), 40, 32))
    assert found.engine is not None
    assert found.engine.name == name
    said = found.headline
    assert said.beside_own is not None
    assert f"Against {name}'s own balancer, {said.beside_own.own_policy} (" in said.sentence
    runs = dict(zip([policy.name for policy in found.policies], found.runs, strict=True))
    assert (runs["own"], runs["oracle"]) == ("yes", "no: sees the step")
    assert runs[said.policy] == "yes"
