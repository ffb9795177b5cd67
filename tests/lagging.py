"""Threads that lag: what they read may have been written again by then, if a rank lent what it did not own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from evenmoe.transport.world import LocalTransport


class LaggingTransport(LocalTransport):
    """Reads what the others posted only a while after they may have gone on."""

    delay_s = 0.0

    def _meet(self, value: object, members: Sequence[int] | None) -> dict[int, Any]:
        posted = super()._meet(value, members)
        time.sleep(self.delay_s)
        return posted


def let_lag(transport: Any, delay_s: float) -> None:
    """Turn a rank's end of a local group into one that lags."""
    transport.__class__ = LaggingTransport
    transport.delay_s = delay_s
