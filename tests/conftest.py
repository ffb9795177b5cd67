"""What several rooms' tests share; the helpers themselves are `tests.worlds` and `tests.processes`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Four processes joined by gloo, started when first used."""
    from tests.processes import Processes  # imports torch, which many tests do without

    pool = Processes(4, [(4, 1), (2, 2)])
    yield pool
    pool.stop()
