"""How much a piece of work costs, in units that other work on the machine and a slower machine change as well."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def effort(work: Callable[[], object], times: int = 3) -> float:
    """CPU time of `work` in this thread, as a multiple of a fixed piece of work that is timed before and after it.

    Of each the least of its runs counts, the one that was disturbed least. Compilation counts where `times` is 1.
    """
    units, spent = [_cpu_seconds(_unit)], []
    for _ in range(times):
        spent.append(_cpu_seconds(work))
        units.append(_cpu_seconds(_unit))
    return min(spent) / min(units)


def _unit() -> None:
    """Half in numpy, half in the interpreter: 10 ms where this was written."""
    values = np.arange(50_000) * 7919 % 50_021
    for _ in range(2):
        np.sort(values)
    counts: dict[int, int] = {}
    for value in values[:25_000].tolist():
        counts[value % 97] = counts.get(value % 97, 0) + 1


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start
