"""The machine that evenmoe runs on, measured in about a second: for trying things out, not for deciding."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from evenmoe.costs.hardware import Exchange, Hardware, KernelFit
from evenmoe.costs.kernel import KernelModel

_SOURCE = "numpy on this machine, float32, measured now"
_BYTES = 64 << 20  # beyond the last cache of a desktop, so that memory is measured


@cache
def measure_cpu() -> Hardware:
    """This machine as `Hardware`: a sum over 64 MiB is its memory, a product of matrices its arithmetic.

    It is measured once in a process. Ranks are threads that reach each other through the same memory.
    """
    numbers = np.ones(_BYTES // 4, np.float32)
    memory = _BYTES / _shortest(numbers.sum)
    square = np.ones((512, 512), np.float32)
    flops = 2 * 512**3 / _shortest(lambda: square @ square)
    copied = _BYTES / _shortest(numbers.copy)
    small = np.ones((1, 1), np.float32)
    start = _shortest(lambda: small @ small) * 1e6
    fit = KernelFit(KernelModel(memory, flops, start_us=start, tile=1), "this machine", _SOURCE)
    exchange = Exchange(start, copied, "this machine", _SOURCE)
    return Hardware(
        name="this CPU",
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        memory_bytes_per_s=memory,
        flops_per_s={1.0: flops, 2.0: flops},
        within_bytes_per_s=copied,
        between_bytes_per_s=copied,
        node_ranks=1 << 20,
        kernels={"decode": fit, "prefill": fit},
        exchanges={"decode": exchange, "prefill": exchange},
        source=_SOURCE,
    )


def _shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls: what disturbs a call only makes it longer."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return max(min(found), 1e-9)
