"""Which policies an engine can run, and why not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.engines import ENGINES
from evenmoe.placement import Placement, default_placement
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.policy_result import PolicyResult
from tests.simulator.simulations import make_simulation

ONCE, TWICE, NEVER = np.array([4]), np.array([4, 8]), np.zeros(0, np.int64)


def policy(**changes) -> PolicyResult:
    """A plan made once, with replicas, by SGLang's and vLLM's expected shares."""
    return replace(make_simulation().policies[1], **{"rule": "even", "refreshes": ONCE, **changes})


def view(name: str) -> EngineView:
    return EngineView.of(ENGINES.get(name))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sglang", {}, None),
        ("sglang", {"rule": "batch"}, "batch rule"),
        ("sglang", {"rule": "rank"}, "rank rule"),
        ("sglang", {"name": "oracle:rule=even"}, "sees the step"),
        ("sglang", {"refreshes": TWICE}, "plans anew"),
        ("sglang", {"refreshes": TWICE, "own_of": "sglang"}, None),
        ("sglang", {"refreshes": TWICE, "own_of": "vllm"}, "plans anew"),
        ("vllm", {}, "loads no file"),
        ("vllm", {"rule": "batch"}, "batch rule"),
        ("vllm", {"own_of": "vllm", "rule": "token"}, None),
        ("vllm", {"refreshes": NEVER}, None),  # the default placement, for ever
        ("vllm-ascend", {"rule": "modulo"}, None),
        ("vllm-ascend", {}, "even rule"),
        ("tensorrt-llm", {"rule": "occurrence"}, None),
        ("evenmoe", {"rule": "batch"}, None),
        ("evenmoe", {"rule": "token"}, None),
    ],
)
def test_reasons(name, changes, reason):
    assert view(name).cannot_run(policy(**changes)) == reason


@pytest.mark.parametrize("rule", ["rank", "batch", "mine"])
def test_the_rule_does_not_matter_where_there_are_no_replicas(rule):
    alone = default_placement(3, 8, 4)
    found = policy(rule=rule, initial=alone, final=Placement(alone.slot_to_expert[:, ::-1], 4))
    assert view("sglang").cannot_run(found) is None


def test_ranks_of_different_sizes_fit_few_engines():
    uneven = Placement([[0, 1, 2, 3, 4, 5, 6, 7, 0]] * 3, 4, rank_sizes=[3, 2, 2, 2])
    assert view("sglang").cannot_run(policy(final=uneven)) == "uneven slots"
    assert view("tensorrt-llm").cannot_run(policy(final=uneven, rule="occurrence")) is None


@pytest.mark.parametrize("name", list(ENGINES))
def test_what_is_kept_of_engines(name):
    engine, found = ENGINES.get(name), view(name)
    assert found.rules[0] == found.rule
    assert set(found.rules) >= {
        rule for rule in ("rank", "token", "occurrence", "batch", "even") if engine.can_run(rule)
    }
    assert ("batch" in found.rules) == (name == "evenmoe")
