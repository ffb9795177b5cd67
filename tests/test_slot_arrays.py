"""Arrays of slots: what is made of them in parts is what is made of them at once."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe import slot_arrays
from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement


@pytest.mark.parametrize("part", [1, 5, 12, 10_000])
def test_replica_numbers_count_from_the_left_wherever_parts_end(part, monkeypatch):
    monkeypatch.setattr(slot_arrays, "_PART", part)
    slots = np.concatenate([np.tile(np.arange(7), (3, 1)), np.random.default_rng(part).integers(0, 7, (3, 10))], axis=1)
    expected = [[row[:slot].count(expert) for slot, expert in enumerate(row)] for row in slots.tolist()]
    placement = Placement(slots, num_ranks=1)
    assert placement.replica_index.tolist() == expected
    assert Placement(slots, num_ranks=1, replica_index=expected) == placement
    with pytest.raises(ConstraintError, match="without expert 7 in layer 0"):
        Placement(slots, num_ranks=1, num_experts=8)
