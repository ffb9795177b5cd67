"""Every rule against its plain loop, bit for bit, and the loads that it produces against the operator on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.metrics import even_rank_loads
from evenmoe.reference import update_expert as reference_rules
from evenmoe.reference.update_expert import update_expert
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from tests.rules.plain_loops import PLAIN_LOOPS
from tests.rules.sampled import layers, placement_with, same


def test_every_rule_of_one_rank_has_a_plain_loop():
    assert set(PLAIN_LOOPS) == {name for name in RULES if name != "even" and not RULES.get(name).needs_counts}


@pytest.mark.parametrize("name", PLAIN_LOOPS)
@settings(max_examples=100, deadline=None)
@given(layer=layers())
def test_a_rule_is_its_plain_loop(name, layer):
    table, num_slots, assignments, masks = layer
    world = len(assignments)
    for rank, (ids, mask) in enumerate(zip(assignments, masks, strict=True)):
        chooser = RULES.get(name).prepare(table, num_slots, rank, world)
        same(chooser(ids, mask), PLAIN_LOOPS[name](ids, table, rank, world, mask))


@pytest.mark.parametrize("rule", ["even", "rank", "token", "occurrence"])
def test_shares_add_up(rule):
    placement = placement_with(5, 8)
    per_slot = RULES.get(rule).shares(placement)[0]
    sums = np.bincount(placement.slot_to_expert[0], weights=per_slot)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-15 * 8)  # eight additions


@pytest.mark.parametrize(("rule", "mode"), [("token", 1), ("rank", 0), ("occurrence", None)])
def test_loads_are_those_of_many_tokens(rule, mode):
    placement, num_ranks, tokens = placement_with(3, 6), 6, 40
    table = placement.eplb_table(0)
    ids = torch.zeros((tokens, 1), dtype=torch.int64)
    taken = np.zeros(placement.num_slots)
    for source in range(num_ranks):
        if mode is None:
            chosen = reference_rules.occurrence(ids, table, source)
        else:
            chosen, _ = update_expert(ids, table, local_rank_id=source, world_size=num_ranks, balance_mode=mode)
        np.add.at(taken, chosen.numpy().reshape(-1), 1)
    load = np.zeros((1, placement.num_experts))
    load[0, 0] = num_ranks * tokens
    # On each rank a replica is off its share by less than one token; by rank the shares are exact.
    off = 0 if rule == "rank" else num_ranks
    assert np.abs(RULES.get(rule).slot_loads(load, placement)[0] - taken).max() <= off


def test_even_loads_are_the_metric_and_batch_is_the_best_split():
    rng = np.random.default_rng(0)
    load = rng.integers(0, 100, (3, 2, 10)).astype(float)
    placement = em.plan(load.mean(0), num_ranks=4, num_slots=16)
    np.testing.assert_allclose(
        RULES.get("even").rank_loads(load, placement), even_rank_loads(load, placement), rtol=1e-14
    )
    best = RULES.get("batch").rank_loads(load, placement)
    assert best.shape == (3, 2, 4)
    assert (best.max(-1) <= even_rank_loads(load, placement).max(-1) + 1e-9).all()
    for window in range(3):
        whole = em.split_batch(load[window].astype(int), placement.slot_to_expert, 4).reshape(2, 4, 4).sum(-1)
        assert (np.ceil(best[window].max(-1) - 1e-9) == whole.max(-1)).all()
    np.testing.assert_allclose(best.sum(-1), load.sum(-1))


def test_mistakes_are_named():
    placement = placement_with(2, 4)
    assert RULES.get("batch").shares(placement) is None
    with pytest.raises(ConstraintError, match=f"`rule` is 'random': it must be one of {', '.join(RULES)}, or"):
        RULES.get("random")
    with pytest.raises(ConstraintError, match=r"`load` is an array of shape \(1, 2\): it must end in the placement's"):
        RULES.get("even").slot_loads(np.ones((1, 2)), placement)


def test_a_rule_that_fails_or_has_no_name_is_no_mistake_in_evenmoe():
    class Broken(Rule):
        name, description = "broken", "It divides by zero."

        def choose(self, expert_ids, eplb_table, **_):
            raise ZeroDivisionError("by zero")

    class Unfinished(Rule):
        name, description = "unfinished", "It cannot choose."

    load, placement = [[6, 1, 3]], em.Placement([[0, 1, 0, 2]], num_ranks=2)
    with pytest.raises(
        ConstraintError, match="`rule` is broken: it must not fail, and raised ZeroDivisionError: by zero; correct it"
    ) as caught:
        Broken().rank_loads(load, placement)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ConstraintError, match="raised NotImplementedError: Unfinished has no `choose`"):
        Unfinished().rank_loads(load, placement)
    with pytest.raises(
        ConstraintError, match="`name` is missing in Nameless: it must be what the rule is called, a st"
    ):
        type("Nameless", (Rule,), {})
