"""Windows mixed into steps: every window as often, none twice in a step."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.traces.mixing import mix_windows
from evenmoe.traces.trace import Trace


@given(data=st.data())
def test_every_window_enters_one_sum(data):
    windows = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(1, windows))
    # Window t has its own bit, so that a sum says what it is made of.
    load = (1 << np.arange(windows))[:, None, None] * np.ones((1, 2, 1), int)
    gaps = np.insert(load, data.draw(st.integers(0, windows)), 0, axis=0)
    mixed = mix_windows(Trace("t", gaps), count, data.draw(st.integers(0, 9))).load
    assert mixed.shape == (windows // count, 2, 1)
    assert (mixed[:, 0, 0] == mixed[:, 1, 0]).all()
    bits = (mixed[:, 0] >> np.arange(windows)) & 1
    assert bits.sum(axis=0).tolist() == [1] * windows
    assert count <= bits.sum(axis=1).min()
    assert bits.sum(axis=1).max() <= bits.sum(axis=1).min() + 1


def test_the_ranks_are_mixed_alike_and_the_seed_decides():
    load = np.random.default_rng(0).integers(0, 9, (9, 2, 3, 4))
    trace = Trace("t", load.sum(axis=1), load_by_rank=load)
    mixed = mix_windows(trace, 3, 1)
    assert mixed.load_by_rank is not None
    assert (mixed.load_by_rank.sum(axis=1) == mixed.load).all()
    assert (mix_windows(trace, 3, 1).load == mixed.load).all()
    assert (mix_windows(trace, 3, 2).load != mixed.load).any()


def test_what_cannot_be_mixed_is_refused():
    two = Trace("two", np.array([[[4, 0]], [[0, 0]], [[0, 2]]]))
    with pytest.raises(ConstraintError, match=re.escape("`mix` is 3: it must be 1 to 2, the windows with tokens")):
        mix_windows(two, 3)
    with pytest.raises(ConstraintError, match="`mix` is 0: it must be 1 to 2"):
        mix_windows(two, 0)
    tokens = Trace("tokens", np.array([[[1, 1]]]), np.zeros((2, 1, 1), np.uint16))
    with pytest.raises(ConstraintError, match="must come with loads alone; leave it out: recorded tokens are mixed"):
        mix_windows(tokens, 1)
