"""A list of named computations, each of which gives one pin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Pin = dict[str, Any]


class Cases(dict[str, Callable[[], Pin]]):
    """{name: what computes its pin}; a pin is JSON: digests, and numbers by which a change can be understood."""

    def add(self, name: str, compute: Callable[[], Pin]) -> None:
        assert name not in self, f"two pins are named {name!r}"
        self[name] = compute
