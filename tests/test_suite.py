"""The suite itself: no test of it reads the clock of a busy machine, and its figures are of a process of their own."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings


@pytest.mark.parametrize("profile", ["repeatable", "clockless"])
def test_hypothesis_never_judges_by_the_clock(profile):
    chosen = settings.get_profile(profile)
    assert chosen.deadline is None
    assert HealthCheck.too_slow in chosen.suppress_health_check
    assert chosen.derandomize == (profile == "repeatable")
