"""A planner in one file, as a user would write it: every rank repeats the experts that it holds anyway."""

from __future__ import annotations

import numpy as np

import evenmoe as em


def plan(load, *, num_ranks, num_slots):
    """Experts dealt out in turn, the heaviest first; further slots begin anew with the heaviest."""
    load = np.asarray(load, float)
    total = load.sum(axis=0) if load.ndim == 3 else load
    heaviest_first = np.argsort(-total, axis=1, kind="stable")
    held = np.resize(np.arange(total.shape[1]), num_slots)
    by_rank = held.reshape(-1, num_ranks).T.ravel()  # slot i of the ranks, one after another
    return em.Placement(heaviest_first[:, by_rank], num_ranks, num_experts=total.shape[1])
