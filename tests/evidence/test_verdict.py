"""Verdicts on synthetic worlds whose truth is known, and each branch of the rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenmoe.evidence import PairedGain, Unevenness, judge, par_gain

EVEN, UNEVEN = Unevenness(1.01, 1.01, 1.02, 1.015, 5e4), Unevenness(1.5, 1.4, 1.02, 1.01, 5e4)
NOISY = Unevenness(1.5, 1.4, 1.6, 1.5, 100.0)


def gain(percent: float, reach: float) -> PairedGain:
    return PairedGain(percent, percent - reach, percent + reach, 8, 0.01)


@pytest.mark.parametrize(
    ("paired", "uneven", "kind", "reason", "more"),
    [
        (gain(9, 3), UNEVEN, "gain", "", 1),
        (gain(9, 3), EVEN, "no gain", "already balanced", 1),
        (gain(9, 3), NOISY, "too little to judge", "sampling noise", 625),  # (50 % ÷ 2 %)²
        (gain(-5, 3), UNEVEN, "no gain", "does not last", 1),
        (gain(0.5, 1), UNEVEN, "no gain", "does not last", 1),
        (gain(0, 0), UNEVEN, "no gain", "nothing moves", 1),
        (gain(0, 0), EVEN, "no gain", "already balanced", 1),
        (gain(4, 8), UNEVEN, "too little to judge", "varies too much", 4),  # (8 ÷ 4)²
        (gain(-1, 8), UNEVEN, "too little to judge", "varies too much", 16),  # (8 ÷ 2)²
        (gain(2.0, 2.1), UNEVEN, "too little to judge", "varies too much", 2),
        (gain(4, math.inf), UNEVEN, "too little to judge", "too few windows", 9),
    ],
)
def test_the_rule(paired, uneven, kind, reason, more):
    found = judge(paired, uneven)
    assert (found.kind, found.reason, found.more) == (kind, reason, pytest.approx(more))
    assert found.more_assignments == pytest.approx((more - 1) * uneven.assignments)


def plain_par_gain(before: np.ndarray, after: np.ndarray, by_layer: bool) -> float:
    def par(loads: list[float]) -> float:
        return max(loads) * len(loads) / sum(loads)

    means = []
    for loads in (before, after):
        groups: dict[int, list[float]] = {}
        for window in range(loads.shape[0]):
            for layer in range(loads.shape[1]):
                if before[window, layer].sum():
                    groups.setdefault(layer if by_layer else window, []).append(par(loads[window, layer].tolist()))
        values = [sum(group) / len(group) for group in groups.values()]
        means.append(sum(values) / len(values))
    return 100 * (1 - means[1] / means[0])


@pytest.mark.parametrize(("windows", "by_layer"), [(1, True), (2, True), (3, False), (40, False)])
def test_windows_are_compared_or_else_layers(windows, by_layer):
    random = np.random.default_rng(windows)
    before, after = random.integers(1, 99, (2, windows, 5, 4)).astype(float)
    before[0, 1] = after[0, 1] = 0
    found = par_gain(before, after)
    blocks = (4 if windows == 1 else 5) if by_layer else min(windows, 12)
    assert found.blocks == blocks
    assert found.percent == pytest.approx(plain_par_gain(before, after, by_layer), rel=1e-9)


def test_no_tokens_show_nothing():
    found = par_gain(np.zeros((3, 2, 2)), np.zeros((3, 2, 2)))
    assert (found.blocks, found.is_significant) == (0, False)
