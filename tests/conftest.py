"""What the tests of several packages share; the helpers themselves are `tests.worlds` and `tests.processes`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.processes import Processes

# Neither a deadline nor a check of the generator's speed: both read the clock, which other work on the machine moves.
# All of it spelled out, since hypothesis has other defaults where it finds that CI runs it.
settings.register_profile("clockless", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
# The suite tries the same examples everywhere, so that a change is judged by itself; `make fuzz` tries new ones.
settings.register_profile("repeatable", settings.get_profile("clockless"), derandomize=True)
settings.load_profile("repeatable")


#: How the reason of every skip begins.
LACKS = "this machine lacks "


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Let a test skip only for what its machine lacks: data that a clone cannot have would never be missed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and LACKS not in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"skipped, but not because {LACKS}something: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Four processes joined by gloo, started when first used."""
    from tests.processes import Processes  # imports torch, which many tests do without

    pool = Processes(4, [(4, 1), (2, 2)])
    yield pool
    pool.stop()
