"""The part of a trace's loads in which anything was recorded: an unused position of a ring buffer is no step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from evenmoe.traces.trace import Trace


def recorded_part(trace: Trace) -> tuple[Trace, int, tuple[str, ...]]:
    """A trace of loads without empty windows and layers, the number of those windows, and notes on what is gone.

    A trace with tokens stays as it is, since they are replayed and not its windows; and so does one of nothing at all.

    >>> part, empty, notes = recorded_part(Trace("ring", np.array([[[0, 0], [3, 1]], [[0, 0], [0, 0]]])))
    >>> part.load.tolist(), empty, notes
    ([[[3, 1]]], 1, ('1 of 2 windows of the trace were left out: nothing was recorded in them.', \
'1 of 2 layers were left out, without a token: 0.'))
    """
    if trace.routing is not None:
        return trace, 0, ()
    windows, layers = np.asarray(trace.load.any(axis=(1, 2))), np.asarray(trace.load.any(axis=(0, 2)))
    if not windows.any() or (windows.all() and layers.all()):
        return trace, 0, ()
    notes = []
    empty = int((~windows).sum())
    if empty:
        notes.append(f"{empty} of {len(windows)} windows of the trace were left out: nothing was recorded in them.")
    if not layers.all():
        numbers = np.arange(len(layers)) if trace.layer_ids is None else trace.layer_ids
        gone = ", ".join(str(number) for number in numbers[~layers].tolist())
        notes.append(f"{int((~layers).sum())} of {len(layers)} layers were left out, without a token: {gone}.")
    by_rank = trace.load_by_rank
    part = replace(
        trace,
        load=trace.load[windows][:, layers],
        load_by_rank=None if by_rank is None else by_rank[windows][:, :, layers],
        layer_ids=None if trace.layer_ids is None else trace.layer_ids[layers],
    )
    return part, empty, tuple(notes)
