"""Placements whose ranks have different numbers of slots, replayed under every rule, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evenmoe.engines.modulo import RULE as MODULO
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.batches import Cluster, new_batches
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.store import load_simulation, save_simulation
from evenmoe.traces.synthesis import small_trace
from evenmoe.traces.trace import Trace
from tests.simulator.test_replay import COSTS
from tests.simulator.test_store import assert_same, rewrite_head

SIZES, EXPERTS, STEPS = (9, 12, 8, 11), 32, 5
CLUSTER = Cluster(4, 2, 8)
TRACE = small_trace()
CALLABLE = [*(RULES.get(name) for name in ("rank", "token", "occurrence", "batch")), MODULO]
LOADS = Trace("loads", TRACE.load, metadata={"top_k": TRACE.top_k})


def uneven(sizes=SIZES, seed: int = 0) -> Placement:
    random = np.random.default_rng(seed)
    rows = [
        random.permutation(np.r_[np.arange(EXPERTS), random.integers(0, EXPERTS, sum(sizes) - EXPERTS)])
        for _ in range(TRACE.num_layers)
    ]
    return Placement(np.array(rows), len(sizes), num_experts=EXPERTS, rank_sizes=sizes)


class Under(Policy):
    """A placement for ever."""

    def first_placement(self, cluster, num_layers, num_experts):
        return uneven()


def replay(rule: Rule | str, trace: Trace = TRACE, **options):
    policy = Under("mine", RULES.get(rule), sum(SIZES))
    options = {"num_ranks": 4, "num_nodes": 2, "tokens_per_rank": 8, "num_steps": STEPS, "workers": 1} | options
    return simulate(trace, ["identity", policy], costs=COSTS, details=True, **options)


def chosen_slots(rule: Rule, placement: Placement, layer: int, experts: np.ndarray) -> np.ndarray:
    """(G, B, K): the slots that ranks choose by the rule itself, from a table that is written out here."""
    if rule.name == "batch":
        return by_quota(placement, layer, experts)
    held = placement.slot_to_expert[layer].tolist()
    replicas = [[slot for slot, expert in enumerate(held) if expert == e] for e in range(EXPERTS)]
    width = max(map(len, replicas))
    table = torch.tensor([[len(row), *row, *[0] * (width - len(row))] for row in replicas], dtype=torch.int32)
    found = []
    for rank, ids in enumerate(experts.astype(np.int64)):
        choose = rule.prepare(table, len(held), rank, len(experts))
        found.append(choose(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool), None).numpy())
    return np.array(found)


def by_quota(placement: Placement, layer: int, experts: np.ndarray) -> np.ndarray:
    """An expert's assignments, rank after rank and row after row, fill the quotas of its slots one after the other."""
    totals = np.bincount(experts.ravel(), minlength=EXPERTS)
    plan = SplitPlan(placement.slot_to_expert[layer], 4, EXPERTS, rank_sizes=placement.rank_sizes)
    left = plan.split(totals)
    slots = np.zeros(experts.shape, np.int64)
    for place in np.ndindex(experts.shape):
        fitting = [s for s, e in enumerate(placement.slot_to_expert[layer]) if e == experts[place] and left[s]]
        slots[place] = fitting[0]
        left[fitting[0]] -= 1
    return slots


@pytest.mark.parametrize("rule", CALLABLE, ids=lambda rule: rule.name)
def test_loads_and_rows_are_those_of_plain_loops(rule):
    placement = uneven()
    found = replay(rule).policies[1]
    assert found.details is not None
    batches = new_batches(TRACE, CLUSTER, STEPS, TRACE.top_k or 0, 0, 8)
    for step in range(STEPS):
        batches.advance()
        for layer, experts in enumerate(batches.experts(slice(0, TRACE.num_layers))):
            ranks = placement.slot_to_rank[chosen_slots(rule, placement, layer, experts)]
            loads = np.bincount(ranks.ravel(), minlength=4)
            np.testing.assert_array_equal(found.details.rank_loads[step, layer], loads)
            source = np.arange(4)[:, None, None]
            near = ranks // 2 == source // 2
            sent = [((ranks != source) & near).sum(), (~near).sum()]
            pairs = {(rank, token, target) for (rank, token, _), target in np.ndenumerate(ranks) if target != rank}
            once = [sum(rank // 2 == target // 2 for rank, _, target in pairs)]
            assert found.details.rows[step, layer].tolist() == [*sent, once[0], len(pairs) - once[0]]
    assert found.memory_per_rank == TRACE.num_layers * 12 * 4_000_000


@pytest.mark.parametrize("rule", [*CALLABLE, RULES.get("even")], ids=lambda rule: rule.name)
@pytest.mark.parametrize("trace", [TRACE, LOADS], ids=["tokens", "loads"])
def test_every_assignment_is_computed_once(rule, trace):
    """Also where only counts are known; of both kinds the batch rule's busiest rank is the bound of its split."""
    simulation = replay(rule, trace)
    found = simulation.policies[1]
    assert found.details is not None
    totals = found.details.rank_loads.sum(axis=2)
    assert (totals == 4 * 8 * simulation.top_k).all() or trace is LOADS
    baseline = simulation.policies[0].details
    assert baseline is not None
    np.testing.assert_array_equal(totals, baseline.rank_loads.sum(axis=2))
    if rule.name == "batch":
        others = [replay(other, trace).policies[1].details for other in CALLABLE]
        assert all((found.details.rank_loads.max(axis=2) <= each.rank_loads.max(axis=2)).all() for each in others)


def test_the_same_slots_on_every_rank_are_as_before():
    """Ten on every rank, given as sizes or not."""
    even = uneven((10, 10, 10, 10))
    plain = Placement(even.slot_to_expert, 4, num_experts=EXPERTS)
    options = {"num_ranks": 4, "tokens_per_rank": 8, "num_steps": STEPS, "workers": 1, "costs": COSTS}
    one, other = (simulate(TRACE, {"mine": each}, **options).policies[1] for each in (even, plain))
    np.testing.assert_array_equal(one.step_time, other.step_time)
    np.testing.assert_array_equal(one.par, other.par)


def test_a_file_of_it_comes_back(tmp_path):
    simulation = replay("batch")
    save_simulation(simulation, tmp_path / "a.sim")
    found = load_simulation(tmp_path / "a.sim")
    assert_same(found.policies[1].final.rank_sizes, SIZES)
    assert_same(found.policies[1].par, simulation.policies[1].par)
    assert found.summary.policies[1].extra_memory_bytes_per_rank == TRACE.num_layers * 4 * 4_000_000
    assert not math.isnan(found.summary.headline.net_gain_percent)
    for wrong in ([9, 12, 8], "x", [9.5, 12, 8, 11], 40):
        rewrite_head(tmp_path / "a.sim", lambda head, wrong=wrong: head["policies"][1].update(rank_sizes=wrong))
        with pytest.raises(FileFormatError, match="with `initial` of policy 1 wrong"):
            load_simulation(tmp_path / "a.sim")


class Called(Rule):
    """The first replica, by being called."""

    name = "called"
    description = "the first replica"

    def choose(self, expert_ids, eplb_table, **_):
        """Choose."""
        return eplb_table[expert_ids.long(), 1].to(expert_ids.dtype)


@pytest.mark.parametrize(
    ("sizes", "rule", "text"),
    [
        ((20, 20, 0, 8), "rank",
         "`policy` is 'mine', a placement without a slot on rank 2: it must have a slot on every rank, each of which "
         "has tokens in a replay; replay the ranks that are left: plan for that many, without dead ranks."),
        (SIZES, Called(),
         "`policy` is 'mine', a placement whose ranks have 9, 12, 8, 11 slots: it must have the same number of slots "
         "on every rank for the rule called, which is called with a table; choose one of evenmoe's own rules, or slots "
         "that divide by the ranks."),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed(sizes, rule, text):
    from evenmoe.simulator.fixed import ReplayedTrace, fixed_policy

    with pytest.raises(ConstraintError) as error:
        fixed_policy("mine", uneven(sizes), RULES.get(rule), CLUSTER, ReplayedTrace.of(TRACE, TRACE))
    assert str(error.value) == text
