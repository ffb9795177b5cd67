"""How popular a layer's experts are with each request, and how often a token then picks them.

An expert's log-popularity with a request is a constant of the expert plus a drift of the request:

    skew · b[e] + drift · (√c · Σ_k z[r, k] · a[k, e] / √(k · H) + √(1 - c) · own[r, e])

where everything random is standard normal, c is the co-movement, k counts NUM_FACTORS common factors and H = Σ 1/k.
The z are the request's, the same in all layers. A token then picks experts as a race: expert e arrives after an
exponential time of rate w[e] = exp(log-popularity), and the first K to arrive are taken (Plackett-Luce, without
replacement).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Common factors; the k-th has 1/k of the first one's variance. MMLU's 14,042 prompts on Mixtral-8x7B have variances of
#: 1, 0.43, 0.35, 0.21, 0.13 (mean of 5 and 6), 0.09 (7, 8), 0.06 (9 to 16), 0.03 (17 to 32), and gpt-oss-20b's requests
#: 1, 0.35, 0.27, 0.26, 0.14, 0.10, 0.07; 1/k gives 1, 0.5, 0.33, 0.25, 0.18, 0.13, 0.08 and, as nobody's own, the rest.
NUM_FACTORS = 16


@dataclass(frozen=True)
class Character:
    """The four parameters of a trace.

    Attributes:
        skew: standard deviation of the experts' log-popularity, at least 0.
        drift: standard deviation, between requests, of one expert's log-popularity; at least 0.
        locality: mean probability, 0 to below 1, that an expert's luck with a token stays for the next token. Experts
            differ: the probability is Beta(a, 1) over experts, so that neighbours n tokens apart resemble each other
            as a / (a + n), which is as slow as measured.
        comovement: 0 to 1, the part of drift's variance that experts of all layers have in common.
    """

    skew: float
    drift: float
    locality: float
    comovement: float


def request_factors(num_requests: int, character: Character, rng: np.random.Generator) -> FloatArray:
    """(requests, NUM_FACTORS): z, scaled to the factors' parts of the drift."""
    part = 1.0 / np.arange(1, NUM_FACTORS + 1)
    part *= character.comovement / part.sum()
    return rng.standard_normal((num_requests, NUM_FACTORS)) * (character.drift * np.sqrt(part))


def layer_popularity(
    num_experts: int, factors: FloatArray, character: Character, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """One layer's log-popularity (requests, E), its largest per request 0, and stickiness (E,) of the experts."""
    base = rng.standard_normal(num_experts) * character.skew
    loadings = rng.standard_normal((NUM_FACTORS, num_experts))
    if character.locality > 0:
        sticky = rng.random(num_experts) ** ((1 - character.locality) / character.locality)  # Beta(a, 1), a / (a + 1)
    else:
        sticky = np.zeros(num_experts)
    popularity = factors @ loadings
    if character.comovement < 1:
        popularity += rng.standard_normal(popularity.shape) * (character.drift * np.sqrt(1 - character.comovement))
    popularity += base
    popularity -= popularity.max(axis=1, keepdims=True)
    return popularity, sticky


def pick_probability(popularity: FloatArray, top_k: int) -> FloatArray:
    """How likely a token is to pick each expert, (requests, E), summing to `top_k`.

    1 - exp(-w t), with the one t that makes the sum right: the race stopped at a fixed time instead of at its K-th
    arrival. Against drawn tokens it is off by at most 0.02 for 32 experts of skew 1 and top-4.

    >>> pick_probability(np.zeros((1, 4)), 2).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    if top_k >= popularity.shape[1]:
        return np.ones_like(popularity)
    weight = np.exp(popularity)
    time = top_k / weight.sum(axis=1, keepdims=True)
    # The sum is concave in t and at most top_k at the start, so Newton's steps climb to the root and never pass it.
    for _ in range(100):
        missed = np.exp(-weight * time)
        short = top_k - (1 - missed).sum(axis=1, keepdims=True)
        if (short <= 1e-10 * top_k).all():
            break
        time += np.maximum(short, 0) / (weight * missed).sum(axis=1, keepdims=True)
    return 1 - missed


def clumping(sticky: FloatArray, tokens: float) -> FloatArray:
    """How many times wider than independent picks' the variance of a count over `tokens` neighbours is, per expert.

    1 + 2 Σ (1 - d/n) λ^d over distances d below n, in closed form.

    >>> clumping(np.array([0.0, 0.5]), 2).tolist()
    [1.0, 1.5]
    """
    rest = 1 - sticky
    return (1 + sticky) / rest - 2 * sticky * (1 - sticky**tokens) / (tokens * rest**2)
