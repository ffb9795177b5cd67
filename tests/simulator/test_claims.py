"""A gain is claimed where there is one: a small version of `benchmarks/headline.py`."""

from __future__ import annotations

import pytest

from benchmarks.headline import headline_of


def test_nothing_is_claimed_of_balanced_or_small_traces():
    """Each is wrong in one case of a hundred at most, so 20 hold none or one but once in 60 such runs."""
    claimed = [seed for seed in range(1000, 1020) if headline_of(seed, skew=0.0).kind == "gain"]
    assert len(claimed) <= 1, claimed


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_a_steady_skew_is_found(seed):
    said = headline_of(seed, skew=0.8)
    assert said.kind == "gain", said.sentence
