"""The one figure of a replay, and what may be said of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.placement import default_placement
from evenmoe.planner.plan import plan
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.result import Simulation
from evenmoe.traces.trace import Trace
from tests.simulator.simulations import make_simulation

#: Every row costs 1 ms, copies and exchanges almost nothing.
# No call, no tiles: a rank takes as long as its rows.
ROWS = CostModel.for_expert(
    8, 1e3, 1e6, flops_per_s=1e9, latency_us=1.0, memory_bytes_per_s=1e12, within_bytes_per_s=1.6e11,
    start_us=0.0, slot_us=0.0, tile=1,
)  # fmt: skip
EXPERTS, RANKS, TOKENS = 16, 4, 32


def routed(popularity: np.ndarray, steps: int = 40, layers: int = 3, seed: int = 0) -> Trace:
    """Tokens of 2 experts that are drawn by popularity (steps or 1, experts), those of a step by its row."""
    random = np.random.default_rng(seed)
    count = steps * RANKS * TOKENS
    weights = np.repeat(np.broadcast_to(popularity, (steps, EXPERTS)), RANKS * TOKENS, axis=0)
    keys = random.exponential(size=(count, layers, EXPERTS)) / weights[:, None]
    routing = np.argsort(keys, axis=2)[:, :, :2].astype(np.uint16)
    load = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in routing.transpose(1, 0, 2)])
    return Trace("routed", load[None], routing)


def run(trace: Trace, policies=None, costs: CostModel = ROWS, **options) -> Simulation:
    options = {"num_ranks": RANKS, "tokens_per_rank": TOKENS, "num_slots": 20, "workers": 1} | options
    return simulate(trace, policies, costs=costs, **options)


SKEWED = np.r_[8.0, 6, 5, 4, np.ones(12)]  # the default placement has the first four on one rank
FLAT = np.ones(EXPERTS)


def test_a_steady_skew_is_a_gain():
    said = run(routed(SKEWED)).summary.headline
    assert (said.kind, said.reason) == ("gain", "")
    assert 20 < said.lower_percent < said.net_gain_percent < said.upper_percent
    assert said.sentence.startswith(f"With {said.policy} a step takes ")
    assert said.details[-1].startswith("To get the placement: evenmoe plan LOAD --ranks 4 --slots ")
    assert said.measured_on.startswith("Measured on 27 of 40 steps of 128 tokens, after 13 steps of warm-up; one plan")
    assert (said.judged_tokens, said.tokens_to_record, said.windows_to_record) == (27 * 128, None, None)


def test_memory_is_not_recommended_where_rearranging_does_it():
    """Four experts that are busy alike and start on one rank: spread over the ranks, they need no replica."""
    policies = ["evenmoe:slots=20", "evenmoe:slots=16", "static:planner=greedy", "evenmoe:slots=24"]
    said = run(routed(np.r_[6.0, 6, 6, 6, np.ones(12)]), policies).summary.headline
    assert (said.kind, said.policy, said.rearranged_policy) == ("gain", "evenmoe:slots=16", "evenmoe:slots=16")
    assert "for no more memory" in said.sentence


def test_what_more_slots_would_add_is_said():
    """Two experts with most of the load: without replicas one rank has 30 % of all rows."""
    simulation = run(routed(np.r_[20.0, 6, 6, 6, np.ones(12)]), ["evenmoe:slots=16", "evenmoe:slots=24,rule=even"])
    said = simulation.summary.headline
    assert said.policy == "evenmoe:slots=24,rule=even"
    assert said.details[0].startswith("Without more memory the best is evenmoe:slots=16: +")
    assert "more memory on every rank" in said.sentence
    alone = run(routed(np.r_[20.0, 6, 6, 6, np.ones(12)]), ["evenmoe:slots=24,rule=even"]).summary.headline
    assert alone.rearranged_policy is None
    assert "was not tried: add -p evenmoe:slots=16" in alone.details[0]


def test_a_given_placement_may_have_seen_what_it_is_judged_on():
    trace = routed(SKEWED)
    said = run(trace, {"mine": plan(trace.load, num_ranks=RANKS, num_slots=EXPERTS)}).summary.headline
    assert said.details == (
        "mine is in use from the start, so that nothing is copied. If it was made from this trace, the gain is one on "
        "what it has seen.",
    )


def test_a_rule_that_engines_do_not_have_is_said_to_be_none():
    said = run(routed(SKEWED), ["evenmoe:rule=batch", "evenmoe:rule=rank"]).summary.headline
    assert said.fastest_policy == "evenmoe:rule=batch"
    assert said.engine_policy == "evenmoe:rule=rank"
    if said.policy == "evenmoe:rule=batch":
        assert any(text.startswith("The batch rule is evenmoe's own") for text in said.details)


def test_a_balanced_load_is_said_to_be_balanced():
    said = run(routed(FLAT, steps=60, seed=3), tokens_per_rank=960).summary.headline
    assert (said.kind, said.reason) in {("no gain", "already balanced"), ("too little to judge", "sampling noise")}
    few = run(routed(FLAT, steps=12, seed=3)).summary.headline
    assert (few.kind, few.reason) == ("too little to judge", "sampling noise")
    assert few.tokens_to_record > 12 * 128
    assert f"Record {few.tokens_to_record:,} tokens or more; there are 1,536." in few.sentence


def test_what_does_not_last_is_no_gain():
    """Another four experts are busy in every step."""
    popularity = np.ones((40, EXPERTS))
    for step in range(40):
        popularity[step, np.random.default_rng(step).permutation(EXPERTS)[:4]] = 9.0
    said = run(routed(popularity), ["evenmoe:slots=16", "greedy", "oracle"]).summary.headline
    assert said.kind != "gain"
    assert "judge" in said.sentence or "what was busy in the warm-up is not what is busy later" in said.sentence


def test_copies_that_take_longer_than_the_horizon_are_no_gain():
    slow = replace(ROWS, copy_bytes=1e12, within_bytes_per_s=1e6)
    said = run(routed(SKEWED), ["evenmoe"], costs=slow, copy_overlap=False).summary.headline
    assert (said.kind, said.reason) == ("no gain", "copies cost more")
    assert "There is no gain, copying included: evenmoe alone would save" in said.sentence
    beside = run(routed(SKEWED), ["evenmoe"], costs=slow).summary.headline
    assert beside.kind == "no gain"
    assert beside.net_gain_percent == 0.0


def test_a_time_that_no_placement_changes():
    """Latency is all there is."""
    still = replace(ROWS, flops_per_s=1e15, latency_us=1e6)
    said = run(routed(SKEWED), ["evenmoe", "oracle"], costs=still).summary.headline
    assert (said.kind, said.reason) == ("no gain", "hardly a gain")
    assert said.sentence.startswith("There is hardly a gain: evenmoe comes nearest, with 0.0 % of a step's time")
    same = run(routed(SKEWED), ["py:tests.simulator.test_headline:unchanged:slots=16"], costs=ROWS).summary.headline
    assert (same.kind, same.reason) == ("no gain", "nothing moves")


def test_nothing_is_judged_where_no_step_is_left():
    said = run(routed(SKEWED, steps=1)).summary.headline
    assert (said.kind, said.reason, said.judged_tokens) == ("too little to judge", "no judged steps", 0)
    assert said.sentence == (
        "Too little to judge: 128 tokens make 1 step of 128, and none comes after the first plan. Record 1,536 tokens "
        "or more, or replay 2 tokens per rank."
    )
    wide = run(routed(SKEWED, steps=20), window=50).summary.headline
    assert wide.tokens_to_record == 58 * 128  # 50 of warm-up and 8 to judge
    assert wide.sentence == (
        "Too little to judge: 2,560 tokens make 20 steps of 128, and none comes after the first plan, before step 50. "
        "Record 7,424 tokens or more, or replay 8 tokens per rank."
    )
    late = run(routed(SKEWED, steps=20), num_steps=4, refresh=4).summary.headline
    assert "Replay more steps; 2,560 recorded tokens are enough for 20." in late.sentence
    again = run(replace(routed(SKEWED, steps=2)), num_steps=9, refresh=3).summary.headline
    assert "tokens come again before the 3 steps of warm-up are over" in again.sentence


def test_one_policy_is_compared_with_nothing():
    said = run(routed(SKEWED), ["identity", "oracle"]).summary.headline
    assert (said.kind, said.policy, said.net_gain_percent) == ("nothing compared", "identity", 0.0)
    assert said.sentence.startswith(
        "Only identity was replayed, so there is nothing to compare it with; its mean PAR is "
    )


def test_counts_of_one_window_say_what_they_cannot():
    load = np.random.default_rng(0).multinomial(200_000, SKEWED / SKEWED.sum(), (1, 3))
    simulation = run(Trace("one", load), top_k=2)
    assert simulation.recorded_windows == 1
    assert "which cannot show whether its load lasts" in simulation.summary.headline.measured_on


def test_few_windows_are_counted_as_windows():
    """100 steps of 6 windows: more draws from them are no more evidence."""
    random = np.random.default_rng(1)
    load = np.stack([random.multinomial(100_000, random.dirichlet(np.ones(EXPERTS)), 3) for _ in range(6)])
    said = run(Trace("six", load), top_k=2).summary.headline
    assert said.kind == "too little to judge"
    assert said.tokens_to_record is None
    assert said.windows_to_record > 6
    assert f"Record {said.windows_to_record} windows or more; there are 6." in said.sentence


def unchanged(load, *, num_ranks, num_slots):
    """A planner that leaves everything where it is."""
    return default_placement(load.shape[-2], load.shape[-1], num_ranks)


@pytest.mark.parametrize("seed", range(3))
def test_the_figure_is_the_policys_own(seed):
    summary = make_simulation(seed=seed).summary
    shown = {policy.name: policy.net_gain_percent for policy in summary.policies}
    assert summary.headline.net_gain_percent == shown[summary.best_policy] == shown[summary.headline.policy]
    assert summary.headline.fastest_net_gain_percent == max(list(shown.values())[1:])


def test_the_defaults_of_the_costs_are_named():
    assert "modeled for the figures in the settings" in run(routed(SKEWED, steps=6)).summary.headline.measured_on
    usual = run(routed(SKEWED, steps=6), costs=CostModel.for_expert(64, 4e6, 1e7)).summary.headline
    assert "modeled for an H100's decode kernels (measured: SGLang 0.5.10" in usual.measured_on
