"""What several rooms' tests share; the helpers themselves are `tests.worlds` and `tests.processes`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Four processes joined by gloo, started when first used."""
    pool = Processes(4, [(4, 1), (2, 2)])
    yield pool
    pool.stop()
