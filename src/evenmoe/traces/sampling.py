"""Synthetic traces: their parameters, as the measured traces show them, and the experts drawn with these.

The figures are medians over layers of the functions in `statistics`, `common_factor_share` that of all layers together.
Those of synthetic traces are means over seeds 0 and 1, with windows of one request of the mean measured length.

An expert's log-popularity with a request is a constant of the expert plus a drift of the request:

    skew · min(b[e], ceiling) + drift · (Σ_k √v[k] · z[r, k] · a[k, e] + √(1 - Σ v) · own[r, e])

where b, z, a and own are standard normal, and v[k] is the k-th common factor's part of the drift's variance. The z are
the request's, the same in all layers. A token then picks experts as in a race: expert e arrives after an exponential
time of rate w[e] = exp(log-popularity), and the first K to arrive are taken (Plackett-Luce, without replacement).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.traces.models import ModelShape

FloatArray = npt.NDArray[np.float64]

#: Common factors. A power law over so many fits both spectra that are long enough to tell (see `MEASUREMENTS`):
#: those of 14,042 requests to Mixtral-8x7B and of 89 to gpt-oss-20b.
NUM_FACTORS = 64

_NUMBERS_AT_ONCE = 1 << 21  # of a block of tokens × experts: 16 MB each of a handful of arrays
# Rows × inner × columns of a product that OpenBLAS leaves to one thread. A larger one wakes others, which then wait for
# the next by spinning: as much CPU time again as all of `synthesize`, for products of a tenth of it.
_SERIAL_PRODUCT = 1 << 18


@dataclass(frozen=True)
class TraceParameters:
    """The four parameters of a trace.

    Attributes:
        skew: standard deviation of the experts' log-popularity, at least 0.
        drift: standard deviation, between requests, of one expert's log-popularity; at least 0.
        locality: mean probability, 0 to below 1, that an expert's luck with a token stays for the next token. Experts
            differ: the probability is Beta(a, 1) over experts, so that neighbors n tokens apart resemble each other
            as a / (a + n), which is as slow as measured.
        common_factor_share: 0 to 1, the part of drift's variance in the strongest of the factors that all layers have
            in common.
        ceiling: standard deviations above the mean at which an expert's constant popularity is cut off, as balancing
            losses do in some models; 4.0, the default, is as good as none.
    """

    skew: float
    drift: float
    locality: float
    common_factor_share: float
    ceiling: float = 4.0


@dataclass(frozen=True)
class Measurement:
    """Measured traces of one model, and the parameters fitted to them.

    Attributes:
        sources: what was measured: file of routing, its origin.
        shape: (MoE layers, experts, top-k) of the measured model.
        windows, tokens: requests, and their mean number of tokens.
        parameters: fitted parameters.
        figures: statistic -> (measured, synthetic, largest relative difference that a test lets through). The number
            behind a name is the factors of `common_factor_share` or the lag of `locality`.
    """

    sources: tuple[str, ...]
    shape: tuple[int, int, int]
    windows: int
    tokens: int
    parameters: TraceParameters
    figures: Mapping[str, tuple[float, float, float]]


MEASUREMENTS: dict[str, Measurement] = {
    # 89 requests of decoding: MMLU-Pro, fact completion, instructions. All four parameters and the ceiling fitted.
    "gpt-oss-20b": Measurement(
        ("gpt_oss_20b_mmlu_pro_and_other.npz (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, 72b368f60045)",),
        (24, 32, 4),
        89,
        330,
        TraceParameters(skew=1.037, drift=1.071, locality=0.243, common_factor_share=0.410, ceiling=1.137),
        {
            "gini": (0.383, 0.382, 0.02),
            "skew": (2.415, 2.42, 0.02),
            "drift": (0.908, 0.908, 0.02),
            "common_factor_share_1": (0.258, 0.258, 0.02),
            "common_factor_share_4": (0.494, 0.513, 0.05),
            "common_factor_share_16": (0.79, 0.756, 0.05),
            "locality_1": (1.389, 1.389, 0.02),
            "locality_2": (1.185, 1.2, 0.02),
            "locality_4": (1.143, 1.104, 0.05),
            "locality_8": (1.128, 1.039, 0.1),
        },
    ),
    # 173 samples of three tasks. Three tasks are two factors, and samples of one task share a template: the first
    # factor has 0.57 of the drift, which no power law reaches here (0.43 at most). Mixtral's parameter stands in.
    "deepseek-v2-lite": Measurement(
        tuple(
            f"deepseek_v2_lite_esft_{task}.npz (deepseek-ai/ESFT, 579a7711e4b3)"
            for task in ("intent", "law", "summary")
        ),
        (26, 64, 6),
        173,
        145,
        TraceParameters(skew=0.493, drift=0.44, locality=0.222, common_factor_share=0.504),
        {
            "gini": (0.257, 0.256, 0.02),
            "skew": (2.603, 2.689, 0.05),
            "drift": (0.515, 0.519, 0.02),
            "locality_1": (1.945, 1.943, 0.02),
            "locality_2": (1.436, 1.483, 0.05),
            "locality_4": (1.252, 1.222, 0.05),
            "locality_8": (1.196, 1.084, 0.1),
        },
    ),
    # Six requests of greedy decoding: too few for the common factors' share, which is gpt-oss-20b's.
    "deepseek-v4-flash": Measurement(
        ("deepseek_v4_flash_decode.npz (imanu86/reap-loop, 7c90f35d2196)",),
        (40, 256, 6),
        6,
        281,
        TraceParameters(skew=1.383, drift=1.731, locality=0.436, common_factor_share=0.410),
        {
            "gini": (0.691, 0.69, 0.02),
            "skew": (15.392, 13.545, 0.15),
            "drift": (1.228, 1.182, 0.05),
            "locality_1": (2.123, 2.166, 0.05),
            "locality_2": (1.784, 1.701, 0.05),
            "locality_4": (1.434, 1.369, 0.05),
            "locality_8": (1.331, 1.16, 0.15),
        },
    ),
    # One prompt of 109 tokens, so skew and drift are one figure; they are divided so that 1,027 steps, whose busiest
    # expert has 12.3 times the mean (cbx6664/sglang, branch oci, printed output), are about right: 10.2. Locality is
    # DeepSeek-V4-Flash's, the common factors' share gpt-oss-20b's.
    "deepseek-v3": Measurement(
        ("deepseek_v3_single_prompt.npz (cbx6664/sglang, b8efbccde668)",),
        (58, 256, 8),
        1,
        109,
        TraceParameters(skew=1.1, drift=0.6, locality=0.436, common_factor_share=0.410),
        {"gini": (0.673, 0.703, 0.05), "skew": (15.266, 14.312, 0.1)},
    ),
    # 14,042 prompts of MMLU. Only loads: locality is DeepSeek-V2-Lite's.
    "mixtral-8x7b": Measurement(
        ("mixtral_8x7b_mmlu.npz (ajtejankar/mixtral-vis-moe, 5c2f185d5797)",),
        (32, 8, 2),
        2000,
        762,
        TraceParameters(skew=0.180, drift=0.218, locality=0.222, common_factor_share=0.504),
        {
            "gini": (0.073, 0.073, 0.02),
            "skew": (1.221, 1.212, 0.02),
            "drift": (0.182, 0.182, 0.02),
            "common_factor_share_1": (0.324, 0.327, 0.02),
            "common_factor_share_4": (0.587, 0.579, 0.02),
            "common_factor_share_16": (0.822, 0.768, 0.1),
        },
    ),
    # Six domains of 205,000 tokens, three layers. Locality is DeepSeek-V2-Lite's, the share gpt-oss-20b's.
    "olmoe-1b-7b": Measurement(
        ("olmoe_1b7b_base.npz (allenai/OLMoE, 357454f4f647)",),
        (3, 64, 8),
        6,
        205_000,
        TraceParameters(skew=0.416, drift=1.130, locality=0.222, common_factor_share=0.410),
        {"gini": (0.254, 0.254, 0.02), "skew": (2.951, 2.45, 0.2), "drift": (0.714, 0.715, 0.02)},
    ),
}

#: Whose parameters a model without a measured trace takes: one with a router trained alike.
NEAREST: dict[str, str] = {
    "deepseek-moe-16b": "deepseek-v2-lite",  # the same sizes and losses
    "deepseek-v3.2": "deepseek-v3",  # sigmoid scores with a balancing bias
    "glm-4.5": "deepseek-v3",
    "kimi-k2": "deepseek-v3",
    "gpt-oss-120b": "gpt-oss-20b",
    "qwen3-30b-a3b": "olmoe-1b-7b",  # softmax with an auxiliary loss, many small experts
    "qwen3-235b-a22b": "olmoe-1b-7b",
    "llama-4-scout": "mixtral-8x7b",  # few large experts
    "llama-4-maverick": "mixtral-8x7b",
}


def parameters_of(shape: ModelShape) -> TraceParameters:
    """The parameters of a model, measured or its nearest's.

    Raises:
        ConstraintError: a shape that is not in MODELS.
    """
    measured = MEASUREMENTS.get(NEAREST.get(shape.name, shape.name))
    if measured is None:
        raise ConstraintError(
            "model",
            repr(shape.name),
            f"must be one that was measured or resembles one, {', '.join([*MEASUREMENTS, *NEAREST])}",
            "name your shape after the one it resembles, and pass parameters to differ",
        )
    return measured.parameters


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
    popularity = np.empty((len(factors), num_experts))
    step = max(1, _SERIAL_PRODUCT // loadings.size)
    for first in range(0, len(factors), step):
        np.matmul(factors[first : first + step], loadings, out=popularity[first : first + step])
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
