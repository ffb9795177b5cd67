"""The experts of synthetic tokens: how popular a layer's experts are with each request, and what is drawn from that.

An expert's log-popularity with a request is a constant of the expert plus a drift of the request:

    skew · min(b[e], ceiling) + drift · (Σ_k √v[k] · z[r, k] · a[k, e] + √(1 - Σ v) · own[r, e])

where b, z, a and own are standard normal, and v[k] is the k-th common factor's part of the drift's variance. The z are
the request's, the same in all layers. A token then picks experts as in a race: expert e arrives after an exponential
time of rate w[e] = exp(log-popularity), and the first K to arrive are taken (Plackett-Luce, without replacement).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.traces.profiles import TraceParameters

FloatArray = npt.NDArray[np.float64]

#: Common factors. A power law over so many fits both spectra that are long enough to tell (see `profiles`): those of
#: 14,042 requests to Mixtral-8x7B and of 89 to gpt-oss-20b.
NUM_FACTORS = 64

_NUMBERS_AT_ONCE = 1 << 21  # of a block of tokens × experts: 16 MB each of a handful of arrays


def factor_parts(common_factor_share: float) -> FloatArray:
    """(NUM_FACTORS,): each common factor's part of the drift's variance, the first one `common_factor_share`.

    They fall as a power of k and sum to 1; below 1/NUM_FACTORS they are all alike and the rest is each expert's own.

    >>> factor_parts(0.28)[:4].round(2).tolist()
    [0.28, 0.12, 0.08, 0.06]
    >>> float(factor_parts(0.001).sum().round(3)), factor_parts(1.0)[:2].round(9).tolist()
    (0.064, [1.0, 0.0])
    """
    if common_factor_share <= 1 / NUM_FACTORS:
        return np.full(NUM_FACTORS, common_factor_share)
    parts = np.zeros(NUM_FACTORS)
    log_k = np.log(np.arange(1, NUM_FACTORS + 1))
    low, high = 0.0, 1e4
    for _ in range(100):  # the first one's part grows with the power
        power = (low + high) / 2
        parts = np.exp(-power * log_k)
        parts /= parts.sum()
        low, high = (power, high) if parts[0] < common_factor_share else (low, power)
    return parts


def request_factors(num_requests: int, parameters: TraceParameters, rng: np.random.Generator) -> FloatArray:
    """(requests, NUM_FACTORS): z, scaled to the factors' parts of the drift."""
    scale = parameters.drift * np.sqrt(factor_parts(parameters.common_factor_share))
    return rng.standard_normal((num_requests, NUM_FACTORS)) * scale


def layer_popularity(
    num_experts: int, factors: FloatArray, parameters: TraceParameters, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """One layer's log-popularity (requests, E), its largest per request 0, and stickiness (E,) of the experts."""
    base = np.minimum(rng.standard_normal(num_experts), parameters.ceiling) * parameters.skew
    loadings = rng.standard_normal((NUM_FACTORS, num_experts))
    if parameters.locality > 0:
        sticky = rng.random(num_experts) ** ((1 - parameters.locality) / parameters.locality)  # Beta(a, 1), a / (a + 1)
    else:
        sticky = np.zeros(num_experts)
    popularity = factors @ loadings
    own = 1 - factor_parts(parameters.common_factor_share).sum()
    if own > 1e-9:
        popularity += rng.standard_normal(popularity.shape) * (parameters.drift * np.sqrt(own))
    popularity += base
    popularity -= popularity.max(axis=1, keepdims=True)
    return popularity, sticky


def pick_probability(popularity: FloatArray, top_k: int) -> FloatArray:
    """How likely a token is to pick each expert, (requests, E), summing to `top_k`.

    1 - exp(-w t), with the one t that makes the sum right: the race stopped at a fixed time instead of at its K-th
    arrival. At skew 1 that is off by at most 0.05, for 8 experts and top-2 as for 256 and top-8.

    >>> pick_probability(np.zeros((1, 4)), 2).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    if top_k >= popularity.shape[1]:
        return np.ones_like(popularity)
    weight = np.exp(popularity)
    time = top_k / weight.sum(axis=1, keepdims=True)
    # The sum is concave in t and at most top_k at the start, so Newton's steps climb to the root and never pass it.
    missed = np.exp(-weight * time)
    for _ in range(100):
        short = top_k - (1 - missed).sum(axis=1, keepdims=True)
        if (short <= 1e-10 * top_k).all():
            break
        time += np.maximum(short, 0) / (weight * missed).sum(axis=1, keepdims=True)
        missed = np.exp(-weight * time)
    return np.subtract(1, missed)


def overdispersion(sticky: FloatArray, tokens: float) -> FloatArray:
    """How many times the variance of a count over `tokens` neighbors is that of independent assignments, per expert.

    1 + 2 Σ (1 - d/n) λ^d over distances d below n, in closed form.

    >>> overdispersion(np.array([0.0, 0.5]), 2).tolist()
    [1.0, 1.5]
    """
    rest = 1 - sticky
    return (1 + sticky) / rest - 2 * sticky * (1 - sticky**tokens) / (tokens * rest**2)


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
    """int64 (rows, E): tokens of each expert, of about this mean and variance; each row sums to its tokens × K.

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
