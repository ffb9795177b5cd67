"""`mix_windows`: steps that serve many requests at a time, from loads that were recorded request by request."""

from __future__ import annotations

import dataclasses

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.traces.trace import Trace


def mix_windows(trace: Trace, count: int, seed: int = 0) -> Trace:
    """Return the trace with fewer windows, each the sum of `count` of its own or a few more, drawn at random.

    A server's step holds tokens of many requests, and is more even than any of them: what is recorded request by
    request has to be mixed before a window can stand for a step. No window enters two sums, so that what a plan is made
    from never comes again. Requests are taken to come in any order: what drifts in the recording drifts no more.

    Args:
        trace: one of loads alone; empty windows are left out.
        count: windows in each sum, 1 to as many as have tokens.
        seed: of the draw.

    Returns:
        The trace; `load` int64 (T // count, L, E) of the T windows with tokens, tokens; `load_by_rank` likewise.

    Raises:
        ConstraintError: a trace with routing, which mixes requests by itself, or a count beyond its windows.

    >>> three = Trace("three", np.array([[[4, 0]], [[0, 2]], [[1, 0]]]))
    >>> mix_windows(three, 3).load.tolist()
    [[[5, 2]]]
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
    order = np.random.default_rng(seed).permutation(recorded)
    sums = np.array_split(order, len(recorded) // count)
    by_rank = trace.load_by_rank
    return dataclasses.replace(
        trace,
        load=np.stack([trace.load[windows].sum(axis=0) for windows in sums]),
        load_by_rank=None if by_rank is None else np.stack([by_rank[windows].sum(axis=0) for windows in sums]),
    )
