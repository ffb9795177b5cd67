"""`mix_windows`: steps that serve many requests at a time, from loads that were recorded request by request."""

from __future__ import annotations

import dataclasses

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.traces.trace import Trace


def mix_windows(trace: Trace, count: int, seed: int = 0) -> Trace:
    """Return the trace with as many windows, each the sum of `count` different ones drawn at random.

    A server's step holds tokens of many requests, and is more even than any of them: what is recorded request by
    request has to be mixed before a window can stand for a step. Every window enters as many sums as every other.

    Args:
        trace: one of loads alone; empty windows are left out.
        count: windows in each sum, 1 to as many as have tokens.
        seed: of the draw.

    Returns:
        The trace; `load` int64 (T, L, E) of the T windows with tokens, tokens; `load_by_rank` likewise.

    Raises:
        ConstraintError: a trace with routing, which mixes requests by itself, or a count beyond its windows.

    >>> two = Trace("two", np.array([[[4, 0]], [[0, 2]]]))
    >>> mix_windows(two, 2).load.tolist()
    [[[4, 2]], [[4, 2]]]
    """
    if trace.routing is not None:
        raise ConstraintError(
            "mix", count, "must come with loads alone", "leave it out: recorded tokens are mixed request by request"
        )
    recorded = np.flatnonzero(trace.load.any(axis=(1, 2)))
    if not 1 <= count <= len(recorded):
        raise ConstraintError(
            "mix", count, f"must be 1 to {len(recorded)}, the windows with tokens", "mix fewer windows, or record more"
        )
    order = recorded[np.random.default_rng(seed).permutation(len(recorded))]
    drawn = _sums(len(recorded), count, seed)
    by_rank = trace.load_by_rank
    return dataclasses.replace(
        trace,
        load=np.stack([trace.load[order[row]].sum(axis=0) for row in drawn]),
        load_by_rank=None if by_rank is None else np.stack([by_rank[order[row]].sum(axis=0) for row in drawn]),
    )


def _sums(windows: int, count: int, seed: int) -> np.ndarray:
    """int64 (windows, count): what is summed, window t plus `count` - 1 others, the same steps on for every t."""
    steps = (
        np.random.default_rng((seed, 1)).permutation(windows - 1)[: count - 1] + 1 if windows > 1 else np.empty(0, int)
    )
    return (np.arange(windows)[:, None] + np.r_[0, steps]) % windows
