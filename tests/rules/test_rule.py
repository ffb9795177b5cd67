"""The loads that a rule produces, against the operator itself run on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.metrics import even_rank_loads
from evenmoe.reference import update_expert as reference_rules
from evenmoe.reference.update_expert import update_expert
from evenmoe.rules import RULES, rank
from evenmoe.rules.rule import Rule


def placement_with(count, num_ranks, seed=0):
    """Expert 0 in `count` slots on distinct ranks, its table row shuffled; every other slot has its own expert."""
    rng = np.random.default_rng(seed)
    width = -(-count // num_ranks) + 1
    slots = np.arange(num_ranks * width) + 1
    slots[np.arange(count) % num_ranks * width + np.arange(count) // num_ranks] = 0
    _, slots = np.unique(slots, return_inverse=True)
    index = np.zeros(len(slots), int)
    index[slots == 0] = rng.permutation(count)
    return em.Placement([slots], num_ranks, replica_index=[index])


@pytest.mark.parametrize("num_ranks", [1, 5, 6, 8, 16])
def test_rank_shares_are_what_the_ranks_choose(num_ranks):
    for count in range(1, num_ranks + 1):
        placement = placement_with(count, num_ranks)
        table = placement.eplb_table(0)
        taken = np.zeros(placement.num_slots)
        for source in range(num_ranks):
            ids, _ = update_expert(torch.tensor([[0]]), table, local_rank_id=source, world_size=num_ranks)
            taken[int(ids)] += 1
        mine = placement.slot_to_expert[0] == 0
        assert RULES.get("rank").shares(placement)[0, mine].tolist() == (taken[mine] / num_ranks).tolist()
        assert rank.reachable(count, num_ranks) == (taken > 0).sum()


def test_reachable_counts_of_the_specification():
    # §1.4, and the counts that lose replicas on 16, 32 and 64 ranks
    assert rank.reachable([3, 5, 6, 7], 8).tolist() == [3, 4, 4, 4]
    assert rank.reachable([4], 6) == 3
    assert rank.reachable([5, 6, 7, *range(9, 16)], 16).tolist() == [4, 6, 6] + [8] * 7
    assert rank.reachable([9, 10, 12, 15], 32).tolist() == [8, 8, 11, 11]
    assert rank.reachable([9, 12, 11, 14, 15, 13], 64).tolist() == [8, 11, 11, 13, 13, 13]
    assert rank.reachable([250], 384) == 192
    for world in (288, 384):
        assert rank.reachable(np.arange(1, 16), world).tolist() == list(range(1, 16))


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
