"""Policies for decode: what their text says, the step that is planned for, and what ranks do in the replay."""

from __future__ import annotations

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.metrics import peak_over_mean
from evenmoe.rules.batch import BatchRule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.decode import step_options
from evenmoe.simulator.given import parse_policies
from evenmoe.simulator.policies import Planned, check_policy

CLUSTER = Cluster(num_ranks=4, num_nodes=1, tokens_per_rank=4)
EXPERTS, TOP_K, STEPS = 16, 2, 12


def parse(text: str) -> Planned:
    _, policy = parse_policies([text], CLUSTER, num_experts=EXPERTS, num_slots=20, refresh=10, window=7)
    assert isinstance(policy, Planned)
    return policy


@pytest.mark.parametrize(
    ("text", "objective", "planned", "split"),
    [
        ("evenmoe", "tokens", None, None),
        ("evenmoe:rule=batch", "tokens", None, 0),
        ("evenmoe:objective=decode", "decode", 150, 150),
        ("static:objective=decode,weight-rows=35", "decode", 35, 35),
        ("oracle:objective=decode", "decode", 150, 150),
        ("evenmoe:objective=decode,slots=16,rule=rank", "decode", 150, None),
        ("greedy:rule=batch,weight-rows=35", "tokens", None, 35),
        ("evenmoe:objective=tokens", "tokens", None, None),
    ],
)
def test_what_a_text_says(text, objective, planned, split):
    policy = parse(text)
    assert (policy.objective, policy.weight_rows) == (objective, planned)
    assert (policy.rule.weight_rows if isinstance(policy.rule, BatchRule) else None) == split
    check_policy(policy, CLUSTER, EXPERTS)
    assert ("in decode" in policy.description) == (objective == "decode")
    assert (f"an expert's weights being worth {split} rows" in policy.description) == bool(split)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("evenmoe:weight-rows=35", "has weight-rows with neither objective=decode nor rule=batch; add one of them"),
        ("evenmoe:objective=speed", "has objective=speed; use one of tokens, decode"),
        ("evenmoe:objective=decode,weight-rows=-1", "has weight-rows=-1; use a whole number, 0 or more"),
        ("greedy:objective=decode", "has 'objective', which greedy does not take"),
        ("evenmoe:objective=decode,rule=rank", "its `rule` is 'rank' with 20 slots for 16 experts, which must be"),
        ("static:objective=decode,planner=greedy", "its `planner` is greedy, which takes no `objective`"),
    ],
)
def test_what_cannot_be(text, error):
    with pytest.raises(ConstraintError) as raised:
        check_policy(parse(text), CLUSTER, EXPERTS)
    assert error in str(raised.value)


def test_plans_for_tokens_and_for_decode_are_not_one():
    texts = ("evenmoe:rule=batch", "evenmoe:objective=decode", "evenmoe:objective=decode,weight-rows=9")
    assert len({parse(text).plan_made_anew for text in texts}) == 3


def test_the_step_is_that_of_the_replay():
    past = np.zeros((2, 2, 4))
    past[:, 0] = [[16, 8, 4, 4], [10, 10, 10, 2]]
    options = step_options("decode", 35, CLUSTER, past)
    assert options == {"objective": "decode", "tokens_per_step": 16, "top_k": 2, "weight_rows": 35}
    past[:, 0] = [[16, 8, 0, 0], [16, 0, 0, 0]]  # of some tokens one pick is missing: expert 0 has 0.8 of what is left
    assert step_options("decode", 35, CLUSTER, past)["top_k"] == 1
    assert step_options("decode", 35, CLUSTER, np.zeros((1, 1, 4)))["top_k"] == 1
    assert step_options("tokens", None, CLUSTER, past) == {}


def test_ranks_do_what_plan_and_split_say():
    random = np.random.default_rng(3)
    popular = -np.log(np.arange(1, EXPERTS + 1))
    scores = popular + random.gumbel(size=(STEPS * 16, 1, EXPERTS))
    routing = np.argsort(scores, axis=-1)[:, :, -TOP_K:].astype(np.int64)
    load = np.bincount(routing.ravel(), minlength=EXPERTS)[None, None]
    trace = em.Trace("routed", load, routing=routing)
    result = em.simulate(
        trace,
        ["static:objective=decode,slots=20,weight-rows=35"],
        num_ranks=4,
        tokens_per_rank=4,
        costs=CostModel.for_expert(64, 1000, 1000),
        num_steps=STEPS,
        window=6,
        chunk=4,
        details=True,
    )
    policy = result.policies[-1]
    assert policy.details is not None
    baseline = result.policies[0].details
    assert baseline is not None
    steps = routing.reshape(STEPS, 16, TOP_K)
    counts = np.stack([np.bincount(step.ravel(), minlength=EXPERTS) for step in steps])
    # The default placement of 16 experts on 4 ranks has no replicas: the batches are these, if its rank loads are.
    assert (baseline.rank_loads[:, 0] == counts.reshape(STEPS, 4, 4).sum(axis=-1)).all()
    decode = {"objective": "decode", "tokens_per_step": 16, "top_k": TOP_K, "weight_rows": 35}
    planned = em.plan(counts[:6].sum(axis=0)[None], num_ranks=4, num_slots=20, rule="batch", **decode)
    assert policy.final == planned
    for step in range(6, STEPS):
        split = em.split_batch(counts[step], planned.slot_to_expert[0], 4, weight_rows=35)
        loads = split.reshape(4, -1).sum(axis=-1)
        assert (policy.details.rank_loads[step, 0] == loads).all()
        assert policy.par[step, 0] == peak_over_mean(loads.astype(float))
