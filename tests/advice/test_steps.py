"""Steps by hand: what is drawn, where it goes, and how long the slowest rank takes."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe.advice.steps import DRAWS, Layout, draw_rows, exchange_us
from evenmoe.placement import Placement, default_placement
from evenmoe.planner.plan import plan
from evenmoe.rules import RULES
from evenmoe.rules.batch import BatchRule
from evenmoe.simulator.costs import CostModel

COSTS = CostModel(1, 1, 1, 1, 1, 1, 1, 1, latency_us=0, start_us=0, slot_us=0, norm=1, tile=4)


@pytest.mark.parametrize("rule", ["even", "rank", "token", "batch"])
def test_every_assignment_goes_to_a_slot_of_its_expert(rule):
    rng = np.random.default_rng(0)
    placement = plan(rng.integers(1, 99, (3, 8)), num_ranks=4, num_slots=12, rule=rule)
    rows = rng.integers(0, 50, (5, 3, 8))
    found = Layout(placement, RULES.get(rule)).slot_rows(rows, rng)
    for layer in range(3):
        for expert in range(8):
            held = placement.slot_to_expert[layer] == expert
            np.testing.assert_array_equal(found[:, layer, held].sum(axis=1), rows[:, layer, expert])


def test_shares_are_met_in_the_long_run():
    placement = Placement([[0, 1, 0, 2]], num_ranks=2)
    rows = np.array([[[6_000_000, 5, 7]]])
    (((one, fixed, other, last),),) = Layout(placement, RULES.get("even")).slot_rows(rows, np.random.default_rng(0))
    # The binomial's deviation is 1,225; six of them are passed once in 5e8 draws.
    assert abs(one - other) < 2 * 6 * 1225
    assert (fixed, last) == (5, 7)


def test_the_slowest_rank_by_hand():
    """Rank 0 has 5 and 0 rows, two tiles of 4 and one read; rank 1 has 1 and 3, two tiles and two reads."""
    rows = np.array([[[5, 0, 1, 3]]])
    times = Layout(default_placement(1, 4, 2), RULES.get("even")).times(rows, COSTS, np.random.default_rng(0))
    assert times.tolist() == [[(8 + 2) * 1e6]]


def test_the_batch_rule_reads_fewer_weights_where_these_weigh():
    placement = Placement([[0, 1, 0, 2]], num_ranks=2)
    rows = np.array([[[6, 0, 3]]])
    found = Layout(placement, BatchRule(150)).slot_rows(rows, np.random.default_rng(0))
    assert found.tolist() == [[[6, 0, 0, 3]]]


def test_draws_keep_the_shares_of_each_part_and_fill_empty_layers():
    load = np.array([[[3.0, 1.0], [0.0, 0.0]], [[0.0, 4.0], [1.0, 1.0]]])
    rows = draw_rows(load, 1000, 1, np.random.default_rng(0))
    assert rows.shape == (2 * DRAWS, 2, 2)
    assert (rows[DRAWS:, 0, 0] == 0).all()
    assert (rows[DRAWS:, 0, 1] == 1000).all()
    assert (rows[:DRAWS, 1].sum(axis=1) > 800).all()  # the shares of all parts
    assert draw_rows(load, 7, 5, np.random.default_rng(0)).max() <= 7


def test_one_rank_exchanges_nothing_but_calls():
    assert exchange_us(64, 1, 8, CostModel(1, 1, 1, 1, 1, latency_us=3.0)) == 2 * 3.0
    two = CostModel(1, 1, 1, 1, 1, within_bytes_per_s=1e6, latency_us=0.0)
    # 32 tokens a rank, of whose two ranks one expert hits the other with chance 1/2: 16 rows of 2 bytes.
    assert exchange_us(64, 2, 1, two) == pytest.approx(32.0)
