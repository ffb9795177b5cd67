"""Nothing that evenmoe computes may change unseen: plans, operators and commands, bit for bit as they were pinned.

A pin that changes with a reason is written anew by `python -m tests.pins.make_pins`, and the commit says the reason.
"""

from __future__ import annotations

import pytest

from tests.pins.cases import Pin
from tests.pins.make_pins import AREAS, computed, stored_pins

STORED = {area: stored_pins(area) for area in AREAS}
ALL = [(area, name) for area, cases in AREAS.items() for name in cases]


@pytest.mark.parametrize(("area", "name"), ALL, ids=[f"{area}: {name}" for area, name in ALL])
def test_it_is_as_pinned(area, name):
    assert _by_path(computed(area, name)) == _by_path(STORED[area][name])


@pytest.mark.parametrize("area", AREAS)
def test_every_pin_is_computed(area):
    assert list(STORED[area]) == list(AREAS[area])


def _by_path(pin: Pin) -> Pin:
    """With the list of numbers as an object, so that a failure shows those that differ."""
    return {**pin, "numbers": dict(pin["numbers"])} if "numbers" in pin else pin
