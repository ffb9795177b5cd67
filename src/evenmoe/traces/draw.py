"""Picks of one layer: token by token, or as counts without tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.traces.popularity import FloatArray

_NUMBERS_AT_ONCE = 1 << 21  # of a block of tokens × experts: 16 MB each of a handful of arrays


def draw_tokens(
    popularity: FloatArray,
    sticky: FloatArray,
    request_of_run: npt.NDArray[np.int64],
    run_start: npt.NDArray[np.int64],
    top_k: int,
    groups: tuple[int, int],
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    """(tokens, K) distinct experts, the likeliest first.

    Tokens i to j - 1 of a run, from `run_start[r]` to `run_start[r + 1]`, are of request `request_of_run[r]`. An
    expert's arrival time stays from one token of a run to the next with probability `sticky`; so each token alone is
    distributed as if it did not. With groups (n, m) a token takes the m of n groups whose two first arrivals are
    earliest, and its experts from those.
    """
    tokens, experts = int(run_start[-1]), popularity.shape[1]
    slowness = np.exp(-popularity)
    begins = np.zeros(tokens, bool)
    begins[run_start[:-1]] = True
    request = np.repeat(request_of_run, np.diff(run_start))
    chosen = np.empty((tokens, top_k), np.uint16)
    kept = np.zeros(experts)
    step = max(1, _NUMBERS_AT_ONCE // experts)
    for first in range(0, tokens, step):
        rows = slice(first, min(tokens, first + step))
        luck = rng.standard_exponential((rows.stop - first, experts))
        fresh = (rng.random(luck.shape) >= sticky) | begins[rows, None]
        luck[0] = np.where(fresh[0], luck[0], kept)
        fresh[0] = True
        since = np.where(fresh, np.arange(len(luck), dtype=np.int32)[:, None], 0)
        np.maximum.accumulate(since, axis=0, out=since)
        luck = np.take_along_axis(luck, since, axis=0)
        kept = luck[-1]
        arrival = luck * slowness[request[rows]]
        if groups[1] < groups[0]:
            arrival[_outside_groups(arrival, *groups)] = np.inf
        best = np.argpartition(arrival, min(top_k, experts - 1), axis=1)[:, :top_k]
        order = np.argsort(np.take_along_axis(arrival, best, axis=1), axis=1)
        chosen[rows] = np.take_along_axis(best, order, axis=1)
    return chosen


def _outside_groups(arrival: FloatArray, num_groups: int, top_groups: int) -> npt.NDArray[np.bool_]:
    """Experts of all groups but a token's best; a group's score is the sum of its two highest rates, 1/time."""
    grouped = arrival.reshape(len(arrival), num_groups, -1)
    two = np.partition(grouped, min(1, grouped.shape[2] - 1), axis=2)[:, :, :2]
    score = (1 / two).sum(axis=2)
    worse = np.argsort(-score, axis=1)[:, top_groups:]
    outside = np.zeros(grouped.shape, bool)
    np.put_along_axis(outside, worse[:, :, None], True, axis=1)
    return outside.reshape(arrival.shape)


def draw_counts(
    mean: FloatArray, variance: FloatArray, tokens: npt.NDArray[np.int64], top_k: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """int64 (rows, E): picks of each expert with about this mean and variance; each row sums to its tokens × K exactly.

    Gamma-distributed targets of that mean and variance are scaled to the sum, none above the row's tokens, and rounded
    with one random offset per row: every count is its target rounded up or down.
    """
    spread = np.maximum(variance, 1e-9 * mean)
    target = rng.standard_gamma(mean * mean / spread) * (spread / mean)
    target += 1e-9 * mean  # where every target of a row is 0, which one token on 256 experts may have
    total = (tokens * top_k)[:, None]
    target *= total / target.sum(axis=1, keepdims=True)
    limit = tokens[:, None] * (1 - 1e-9)  # so that rounding up reaches the tokens, and no sum of roundings passes them
    for _ in range(50):
        full = target >= limit
        left = total - np.where(full, limit, 0).sum(axis=1, keepdims=True)
        free = np.where(full, 0, target).sum(axis=1, keepdims=True)
        scale = np.divide(left, free, out=np.ones_like(free), where=free > 0)
        target = np.where(full, limit, np.minimum(target * scale, limit))
        if (np.abs(scale - 1) < 1e-12).all():
            break
    edges = np.cumsum(target, axis=1)
    edges[:, -1] = total[:, 0]
    steps = np.floor(edges + rng.random(total.shape)).astype(np.int64)
    return np.diff(steps, axis=1, prepend=0)
