"""The grammar of `--policy`."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe.errors import ConstraintError
from evenmoe.planner.plan import plan
from evenmoe.rules import RULES
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.given import parse_policies
from evenmoe.simulator.policies import (
    Oracle,
    Policy,
    Refreshed,
    Static,
    check_policy,
    default_policies,
)
from evenmoe.simulator.policy_text import PolicyText

CLUSTER = Cluster(8, 2, 16)
DEFAULT = default_policies(32, 24, once=False)


def parse(*texts: str):
    return parse_policies(texts, CLUSTER, num_experts=20, num_slots=32, refresh=10, window=7)


def test_the_defaults_are_every_kind():
    policies = parse(*DEFAULT)
    assert [policy.name for policy in policies] == list(DEFAULT)
    assert {type(policy) for policy in policies} == {Policy, Static, Refreshed, Oracle}
    assert {policy.planner for policy in policies if isinstance(policy, Refreshed)} == {"greedy", "evenmoe"}


def test_what_needs_no_more_slots_is_always_among_the_defaults():
    assert default_policies(32, 24, once=False) == (
        "identity", "static", "static:slots=24", "greedy", "evenmoe:slots=24", "evenmoe:rule=rank",
        "evenmoe:rule=occurrence", "evenmoe:rule=batch", "oracle",
    )  # fmt: skip
    assert default_policies(24, 24, once=False) == tuple(name for name in DEFAULT if "slots" not in name)
    assert default_policies(32, 24, once=True) == tuple(name for name in DEFAULT if "static" not in name)


def test_the_first_plan_may_come_before_a_refresh_is_over():
    found = parse_policies(
        ["evenmoe", "greedy:refresh=4", "static", "oracle"],
        CLUSTER, num_experts=20, num_slots=32, refresh=10, window=7, first=6,
    )  # fmt: skip
    planned = [[step for step in range(30) if policy.is_due(step)] for policy in found]
    assert planned == [[], [6, 16, 26], [4, 8, 12, 16, 20, 24, 28], [7], []]
    assert [policy.first_plan for policy in found] == [0, 6, 4, 7, 0]
    assert "made every 10 steps from step 6 on" in found[1].description


def test_what_is_not_said_comes_from_the_call():
    _, policy = parse("evenmoe")
    assert (policy.rule.name, policy.plan_for, policy.num_slots, policy.refresh, policy.window) == (
        "rank",
        "rank",
        32,
        10,
        7,
    )
    assert (policy.pieces, policy.max_copies, policy.target_par, policy.start) == (1, 4, None, "first")
    assert (parse("greedy")[1].max_copies, parse("greedy")[1].start) == (None, "scratch")


def test_every_key_is_read():
    text = "evenmoe:rule=batch,slots=40,groups=4,refresh=3,window=9,pieces=2,plan-for=even,max-copies=0,target-par=1.05"
    _, policy = parse(text)
    assert policy.name == text
    assert (policy.rule.name, policy.num_slots, policy.num_groups, policy.refresh) == ("batch", 40, 4, 3)
    assert (policy.window, policy.pieces, policy.plan_for) == (9, 2, "even")
    assert (policy.max_copies, policy.target_par) == (0, 1.05)
    assert (parse("evenmoe:start=scratch")[1].start, parse("evenmoe:start=scratch")[1].max_copies) == ("scratch", None)
    assert parse("static:planner=greedy")[1].planner == "greedy"
    assert parse("oracle")[1].plan_for == "even"


def test_identity_comes_first_and_once():
    assert [policy.name for policy in parse("greedy", "identity:rule=token", "oracle")] == [
        "identity:rule=token",
        "greedy",
        "oracle",
    ]
    assert parse("identity")[0].num_slots == 24  # 20 experts on 8 ranks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with ''"),
        ("best", "use one of identity, static, evenmoe, greedy, oracle"),
        ("greedy:", "ends in a colon"),
        ("greedy:rule", "gives 'rule' no value"),
        ("greedy:rule=", "gives 'rule' no value"),
        ("greedy:slots=32,", "has '', which greedy does not take"),
        ("greedy:rule=rank,,slots=32", "has '', which greedy does not take"),
        ("greedy:rule=py:m:R,speed=1", "has 'speed', which greedy does not take"),
        ("greedy:rule=best", f"use one of {', '.join(RULES)}"),
        ("greedy:rule=rank,rule=token", "gives 'rule' twice"),
        ("greedy:speed=1", "use rule, slots, groups, refresh, window"),
        ("greedy:max-copies=1", "which greedy does not take"),
        ("identity:slots=32", "which identity does not take"),
        ("greedy:refresh=0", "use a whole number, 1 or more"),
        ("greedy:refresh=1.5", "use a whole number, 1 or more"),
        ("greedy:window=many", "use a whole number, 1 or more"),
        ("greedy:window=99999999999", "use a whole number, 1 or more"),
        ("evenmoe:target-par=0.9", "use a number, 1 or more"),
        ("evenmoe:target-par=nan", "use a number, 1 or more"),
        ("evenmoe:start=now", "use one of first, previous, scratch"),
        ("evenmoe:start=scratch,max-copies=3", "a limit needs a placement to keep"),
        ("greedy:slots=16", "use a multiple of 8, 24 or more"),
        ("greedy:slots=33", "use a multiple of 8, 24 or more"),
        ("greedy:groups=3", "use 1, or a multiple of 2 that divides 20"),
    ],
)
def test_mistakes_name_the_policy_and_the_fix(text, words):
    with pytest.raises(ConstraintError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert repr(text) in str(caught.value)


def test_the_same_policy_twice_is_refused():
    with pytest.raises(ConstraintError, match="must be given once"):
        parse("greedy", "greedy")


def test_descriptions_say_what_is_done():
    *_, policy = parse("evenmoe:rule=batch,pieces=2,max-copies=3,target-par=1.1")
    assert policy.description == (
        "evenmoe's plan for the batch rule on 32 slots, made every 10 steps from the 7 steps before as 2 windows, "
        "starting from the placement in use but for the first time, at most 3 copies a layer, down to a PAR of 1.1, "
        "replicas chosen by the batch rule."
    )
    assert len({policy.description for policy in parse(*DEFAULT)}) == len(DEFAULT)


def test_every_policy_starts_alike():
    _, policy = parse("greedy")
    assert policy.first_placement(CLUSTER, 2, 20).slot_to_expert.tolist() == [[s % 20 for s in range(32)]] * 2


def test_a_window_is_cut_into_pieces():
    """Experts 0 and 1 are busy in the older steps, 2 and 3 in the newer: only a plan from pieces keeps them level."""
    cluster = Cluster(2)
    past = np.array([[[9.0, 9, 1, 1]]] * 3 + [[[1.0, 1, 9, 9]]] * 3)
    _, whole, pieces = parse_policies(
        ["evenmoe:rule=even,start=scratch", "evenmoe:rule=even,start=scratch,pieces=2"],
        cluster, num_experts=4, num_slots=4, refresh=1, window=6,
    )  # fmt: skip
    slots = pieces.plan(cluster, past, None, 0).slot_to_expert.reshape(2, 2) // 2
    assert [sorted(rank) for rank in slots.tolist()] == [[0, 1], [0, 1]]
    level = whole.plan(cluster, past, None, 0)
    assert whole.plan(cluster, past[::-1].copy(), None, 0) == level  # one sum has no order


def test_greedy_adds_the_pieces_up():
    _, whole, pieces = parse("static:planner=greedy", "static:planner=greedy,pieces=3")
    past = np.random.default_rng(0).exponential(size=(7, 2, 20)) ** 3
    assert pieces.plan(CLUSTER, past, None, 0) == whole.plan(CLUSTER, past, None, 0)


def test_a_path_may_have_colons_and_an_error_names_the_policy():
    def kind(text: str):
        found = PolicyText(text, {})
        found.read_options(("slots", "rule"))
        return found.kind, found.given

    assert kind(r"py:C:\my plans\a.py:f:slots=3") == (r"py:C:\my plans\a.py:f", {"slots": "3"})
    assert kind("py:a, b: c/d.py:f") == ("py:a, b: c/d.py:f", {})
    assert kind("py:m:f:rule=py:a.py:R") == ("py:m:f", {"rule": "py:a.py:R"})
    assert kind("py:m:f:rule=py:/a, b/c:d.py:R,slots=3") == ("py:m:f", {"rule": "py:/a, b/c:d.py:R", "slots": "3"})
    assert kind("greedy:slots=3,rule=py:/a,b.py") == ("greedy", {"slots": "3", "rule": "py:/a,b.py"})
    assert kind("greedy:rule=py:m:R,slots=3") == ("greedy", {"rule": "py:m:R", "slots": "3"})
    assert kind("greedy:rule=py:/a=b/c.py:R,slots=3") == ("greedy", {"rule": "py:/a=b/c.py:R", "slots": "3"})
    with pytest.raises(
        ConstraintError, match=r"`policy` is 'py:no\.such:f:slots=24': it must be importable, and is not"
    ):
        parse("py:no.such:f:slots=24")


def test_what_a_planner_of_a_policy_breaks_is_said_whole():
    _, policy = parse("py:tests.simulator.test_policies:anew:max-copies=4")
    with pytest.raises(ConstraintError) as caught:
        check_policy(policy, CLUSTER, 20)
    text = str(caught.value)
    assert "its `planner` is py:tests.simulator.test_policies:anew, whose plan makes " in text
    assert text.endswith("copies in one layer, which must make at most 4 of them; correct the planner.")


def test_only_a_planner_that_names_it_is_bounded_where_nothing_is_said():
    """Others may not know of the bound, and would break it."""
    _, policy = parse("py:tests.simulator.test_policies:anew")
    assert (policy.start, policy.max_copies) == ("first", None)
    check_policy(policy, CLUSTER, 20)
    _, policy = parse("py:evenmoe.planner.plan:plan")
    assert (policy.start, policy.max_copies) == ("first", 4)


def anew(load, *, num_ranks, num_slots, **options):
    """A planner that forgets what it was given."""
    return plan(load[..., ::-1] * np.arange(1, 21), num_ranks=num_ranks, num_slots=num_slots)
