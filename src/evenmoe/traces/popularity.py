"""How popular a layer's experts are with each request, and how often a token then picks them.

An expert's log-popularity with a request is a constant of the expert plus a drift of the request:

    skew · min(b[e], ceiling) + drift · (Σ_k √v[k] · z[r, k] · a[k, e] + √(1 - Σ v) · own[r, e])

where b, z, a and own are standard normal, and v[k] is the k-th common factor's part of the drift's variance. The z are
the request's, the same in all layers. A token then picks experts as in a race: expert e arrives after an exponential
time of rate w[e] = exp(log-popularity), and the first K to arrive are taken (Plackett-Luce, without replacement).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Common factors. A power law over so many fits both spectra that are long enough to tell (see `profiles`): those of
#: 14,042 requests to Mixtral-8x7B and of 89 to gpt-oss-20b.
NUM_FACTORS = 64


@dataclass(frozen=True)
class Character:
    """The four parameters of a trace.

    Attributes:
        skew: standard deviation of the experts' log-popularity, at least 0.
        drift: standard deviation, between requests, of one expert's log-popularity; at least 0.
        locality: mean probability, 0 to below 1, that an expert's luck with a token stays for the next token. Experts
            differ: the probability is Beta(a, 1) over experts, so that neighbours n tokens apart resemble each other
            as a / (a + n), which is as slow as measured.
        comovement: 0 to 1, the part of drift's variance in the strongest of the factors that all layers have in common.
        ceiling: standard deviations above the mean at which an expert's constant popularity is cut off, as balancing
            losses do in some models; 4.0, the default, is as good as none.
    """

    skew: float
    drift: float
    locality: float
    comovement: float
    ceiling: float = 4.0


def factor_parts(comovement: float) -> FloatArray:
    """(NUM_FACTORS,): each common factor's part of the drift's variance, the first one `comovement`.

    They fall as a power of k and sum to 1; below 1/NUM_FACTORS they are all alike and the rest is each expert's own.

    >>> factor_parts(0.28)[:4].round(2).tolist()
    [0.28, 0.12, 0.08, 0.06]
    >>> float(factor_parts(0.001).sum().round(3)), factor_parts(1.0)[:2].round(9).tolist()
    (0.064, [1.0, 0.0])
    """
    if comovement <= 1 / NUM_FACTORS:
        return np.full(NUM_FACTORS, comovement)
    parts = np.zeros(NUM_FACTORS)
    log_k = np.log(np.arange(1, NUM_FACTORS + 1))
    low, high = 0.0, 1e4
    for _ in range(100):  # the first one's part grows with the power
        power = (low + high) / 2
        parts = np.exp(-power * log_k)
        parts /= parts.sum()
        low, high = (power, high) if parts[0] < comovement else (low, power)
    return parts


def request_factors(num_requests: int, character: Character, rng: np.random.Generator) -> FloatArray:
    """(requests, NUM_FACTORS): z, scaled to the factors' parts of the drift."""
    scale = character.drift * np.sqrt(factor_parts(character.comovement))
    return rng.standard_normal((num_requests, NUM_FACTORS)) * scale


def layer_popularity(
    num_experts: int, factors: FloatArray, character: Character, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """One layer's log-popularity (requests, E), its largest per request 0, and stickiness (E,) of the experts."""
    base = np.minimum(rng.standard_normal(num_experts), character.ceiling) * character.skew
    loadings = rng.standard_normal((NUM_FACTORS, num_experts))
    if character.locality > 0:
        sticky = rng.random(num_experts) ** ((1 - character.locality) / character.locality)  # Beta(a, 1), a / (a + 1)
    else:
        sticky = np.zeros(num_experts)
    popularity = factors @ loadings
    own = 1 - factor_parts(character.comovement).sum()
    if own > 1e-9:
        popularity += rng.standard_normal(popularity.shape) * (character.drift * np.sqrt(own))
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


def clumping(sticky: FloatArray, tokens: float) -> FloatArray:
    """How many times wider than independent picks' the variance of a count over `tokens` neighbours is, per expert.

    1 + 2 Σ (1 - d/n) λ^d over distances d below n, in closed form.

    >>> clumping(np.array([0.0, 0.5]), 2).tolist()
    [1.0, 1.5]
    """
    rest = 1 - sticky
    return (1 + sticky) / rest - 2 * sticky * (1 - sticky**tokens) / (tokens * rest**2)
