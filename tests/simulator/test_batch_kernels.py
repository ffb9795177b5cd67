"""The compiled draws of counts: binomial, apart for steps, layers and seeds, and rows without replacement."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe.simulator.batch_kernels import draw_counts, share_by_row


@pytest.mark.parametrize(
    ("chance", "tokens"), [(0.5, 1), (0.03, 128), (0.97, 128), (0.2, 5000), (1e-6, 4096), (0.999999, 64)]
)
def test_counts_are_binomial(chance, tokens):
    """Every value's frequency among 200,000 draws, within 6 standard deviations and the 2^-32 of the method."""
    ranks = 200_000
    counts = np.zeros((2, ranks), np.int32)
    draw_counts(np.full((2, 1), chance), tokens, 0, 1, 2, counts)
    values = np.arange(tokens + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(tokens, 0, -1) / np.arange(1, tokens + 1)))])
    probability = np.exp(logs + values * np.log(chance) + (tokens - values) * np.log1p(-chance))
    for row in counts:
        seen = np.bincount(row, minlength=tokens + 1)
        assert len(seen) == tokens + 1
        reach = 6 * np.sqrt(ranks * probability * (1 - probability)) + ranks * 2.0**-31 + 1
        assert (np.abs(seen - ranks * probability) <= reach).all()
    assert abs(np.corrcoef(counts)[0, 1]) < 6 / np.sqrt(ranks) or counts.std(axis=1).min() == 0
    assert abs(np.corrcoef(counts[0, :-1], counts[0, 1:])[0, 1]) < 6 / np.sqrt(ranks)


@pytest.mark.parametrize(("experts", "ranks", "columns"), [(1, 3, 1), (64, 2, 1), (65, 3, 1), (130, 1, 1), (33, 4, 4)])
@pytest.mark.parametrize("tokens", [1, 128, 3000])
def test_chances_that_are_tabulated_together_do_not_touch_each_other(experts, ranks, columns, tokens):
    """Blocks of 64 tables give what each chance gives alone, whatever its neighbors need; 0 and 1 are among them."""
    chance = np.random.default_rng(tokens).random((experts, columns)) ** 6
    chance[::7], chance[3::11] = 0.0, 1.0
    counts, without = np.full((2, experts, ranks), -1, np.int32)
    draw_counts(chance, tokens, 3, 1, 4, counts)
    for expert in range(experts):
        alone = np.zeros_like(chance)
        alone[expert] = chance[expert]
        draw_counts(alone, tokens, 3, 1, 4, without)
        np.testing.assert_array_equal(without[expert], counts[expert])
        assert not np.delete(without, expert, axis=0).any()


def test_certain_and_impossible_experts():
    counts = np.full((2, 3), -1, np.int32)
    draw_counts(np.array([[0.0], [1.0]]), 7, 0, 0, 0, counts)
    assert counts.tolist() == [[0, 0, 0], [7, 7, 7]]


def test_steps_layers_and_seeds_draw_apart():
    def draw(seed, step, layer):
        counts = np.zeros((4, 50), np.int32)
        draw_counts(np.full((4, 1), 0.3), 40, seed, step, layer, counts)
        return counts.tolist()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert draw(*keys[0]) == draw(*keys[0])
    assert len({str(draw(*key)) for key in keys}) == 4


def test_rows_are_drawn_without_replacement():
    """7 rows of 12 on three replicas, rows 0, 3, 6, 9 for the first: a hypergeometric mean of 7 / 3."""
    ranks = 20_000
    counts = np.stack([np.full(ranks, 7, np.int32), np.full(ranks, 12, np.int32), np.full(ranks, 5, np.int32)])
    first, slots = np.array([0, 3, 5, 6]), np.array([4, 0, 2, 1, 5, 3])
    per_slot = np.zeros((6, ranks), np.int32)
    share_by_row(counts, 12, first, slots, 0, 0, 0, per_slot)
    np.testing.assert_array_equal(per_slot[[4, 0, 2]].sum(axis=0), counts[0])
    assert per_slot[[4, 0, 2]].max() == 4
    assert (per_slot[[1, 5]] == 6).all()
    np.testing.assert_array_equal(per_slot[3], counts[2])
    # variance of the hypergeometric number: n K (N - K) (N - n) / (N² (N - 1))
    deviation = np.sqrt(7 * 4 * 8 * 5 / (144 * 11) / ranks)
    assert (np.abs(per_slot[[4, 0, 2]].mean(axis=1) - 7 / 3) < 6 * deviation).all()
