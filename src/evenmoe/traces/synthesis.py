"""`synthesize`: synthetic traces that behave like the measured ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.traces.models import ModelShape, find_model
from evenmoe.traces.sampling import (
    FloatArray,
    TraceParameters,
    draw_counts,
    draw_tokens,
    layer_popularity,
    overdispersion,
    parameters_of,
    pick_probability,
    request_factors,
)
from evenmoe.traces.trace import Trace

IntArray = npt.NDArray[np.int64]
_LARGEST_BYTES = 1 << 32  # of one array of the trace: what a trace file may hold
#: Of the parameters: the largest value, and how it is said. Beyond 8, weights leave the range of float64.
_HIGHEST = {"skew": (8.0, "8"), "drift": (8.0, "8"), "locality": (0.99, "0.99"), "common_factor_share": (1.0, "1")}

#: Live requests that are drawn one by one where only counts are made. With more, each stands for several: it is moved
#: towards the mean of all, so that the windows' mean and variance are those of all the requests.
_MOST_STREAMS = 64


@dataclass(frozen=True)
class _Traffic:
    """Which request every token is of.

    Attributes:
        live: int64 (T, requests), the request in every window's streams.
        num_requests: requests altogether.
        edges: int64 (requests + 1,), where each stream's tokens begin in a window.
        parts: float64 (R, requests), tokens of a stream that source rank r owns.
        requests_per_stream: at least 1.
    """

    live: IntArray
    num_requests: int
    edges: IntArray
    parts: FloatArray
    requests_per_stream: float = 1.0


def synthesize(
    model: str | ModelShape = "deepseek-v3",
    *,
    num_windows: int = 64,
    tokens_per_window: int = 4096,
    requests: int = 8,
    request_windows: int = 1,
    num_layers: int | None = None,
    skew: float | None = None,
    drift: float | None = None,
    locality: float | None = None,
    common_factor_share: float | None = None,
    routing: bool = False,
    source_ranks: int | None = None,
    seed: int = 0,
) -> Trace:
    """Synthesize a trace with the skew, drift, locality and common factors of measured ones.

    Every window holds tokens of `requests` live requests, in equal parts; a request lives for `request_windows`
    windows and makes way for a new one, which has a popularity of its own (see `popularity`). Without `routing` counts
    are drawn from the same popularities, as overdispersed as the tokens': 1,000 windows of 40,960 tokens on
    DeepSeek-V3's 58 × 256 experts take 5 s of CPU and 0.3 GB. With it, a token takes 1 ms on that model, and 0.1 ms on
    gpt-oss-20b.

    Args:
        model: name or alias in `MODELS`, or a shape. One that was not measured takes the parameters of its nearest
            (`sampling.NEAREST`).
        num_windows: T; tokens_per_window: tokens of each, each of which is assigned K experts in every layer.
        requests: live at a time, at most one per token. More of them drift less together; without `routing`, beyond 64
            the windows' means and variances are drawn as of so many, not every request.
        request_windows: windows that a request lives.
        num_layers: only the first so many MoE layers; None for all.
        skew: standard deviation of the experts' log-popularity, 0 to 8.
        drift: standard deviation of an expert's log-popularity between requests, 0 to 8.
        locality: mean probability that an expert's luck stays for a request's next token, 0 to 0.99.
        common_factor_share: part of the drift's variance in the strongest factor common to all layers, 0 to 1.
            None takes what was fitted to measured traces.
        routing: also every token's experts, distinct, the first choice first; `seq_start` then marks each request's
            tokens within each window. Groups limit them as they limit the model's.
        source_ranks: R, also the load by source rank; ranks own equal runs of each window's tokens.
        seed: the same arguments give the same trace.

    Returns:
        A `Trace` with the model's `layer_ids`, and the arguments and parameters in `metadata`.

    Raises:
        ConstraintError: an unknown model, a number out of range, or arrays larger than a trace file may hold.

    How well it fits. Each parameter was matched to one statistic of `statistics` at the measured number and mean length
    of requests; `sampling.MEASUREMENTS` has the files, and what was measured beside what is synthesized, fitted or not.
    gpt-oss-20b's busiest experts are cut off at a fitted ceiling. DeepSeek-V3's skew and drift come from one prompt
    of 109 tokens (gini 0.673 / 0.703, skew 15.3 / 14.3), and 1,027 steps of 116 tokens have skew 12.3 / 10.2.
    What the fit never saw: a placement for 8 ranks and 40 slots planned on the sum of every other gpt-oss-20b request
    has a peak-to-average load of 1.63 / 1.69 on the requests between, planned on windows 1.40 / 1.50, the default
    placement 1.85 / 2.02. What is missing: words that prompts share, so real requests of one task are more alike than
    these; slow changes within a request; experts that are chosen together by single tokens.

    Two windows on DeepSeek-V2-Lite's first three MoE layers: each of 100 tokens takes 6 of 64 experts.

    >>> trace = synthesize("deepseek-v2-lite", num_windows=2, tokens_per_window=100, num_layers=3, routing=True)
    >>> trace.load.shape, trace.load.sum(axis=2).tolist(), trace.routing.shape
    ((2, 3, 64), [[600, 600, 600], [600, 600, 600]], (200, 3, 6))
    >>> trace.layer_ids.tolist(), trace.seq_start[:3].tolist()
    ([1, 2, 3], [0, 12, 25])
    """
    shape = find_model(model) if isinstance(model, str) else model
    if not 1 <= shape.top_k <= shape.num_experts <= 1 << 16 or shape.num_experts % shape.num_groups:
        raise ConstraintError(
            "model",
            f"of {shape.num_experts} experts in {shape.num_groups} groups, top-{shape.top_k}",
            "must have equal groups, at most 65536 experts, and no more experts per token than it has",
            "correct the shape",
        )
    if num_layers is not None:
        _check_range("num_layers", num_layers, 1, shape.num_layers, f"the MoE layers of {shape.name}")
        shape = replace(shape, num_layers=num_layers)
    parameters = _parameters(shape, skew=skew, drift=drift, locality=locality, common_factor_share=common_factor_share)
    _check_range("num_windows", num_windows, 1, 1 << 30, "a count")
    _check_range("tokens_per_window", tokens_per_window, 1, 1 << 40, "a count")
    _check_range("requests", requests, 1, tokens_per_window, "at most one for each token of a window")
    _check_range("request_windows", request_windows, 1, 1 << 30, "a count")
    _check_range("seed", seed, 0, 1 << 63, "a seed")
    if source_ranks is not None:
        _check_range("source_ranks", source_ranks, 1, tokens_per_window, "at most one for each token of a window")
    streams = requests if routing else min(requests, _MOST_STREAMS)
    traffic = _traffic(num_windows, tokens_per_window, streams, request_windows, source_ranks or 1)
    traffic = replace(traffic, requests_per_stream=requests / streams)
    _check_size(shape, num_windows, source_ranks or 1, num_windows * tokens_per_window if routing else 0)
    starts = chosen = None
    if routing:
        chosen = _draw_routing(shape, traffic, parameters, seed)
        by_rank = _count(chosen, traffic, source_ranks or 1, shape.num_experts)
        starts = _run_starts(traffic)
    else:
        by_rank = _draw_loads(shape, traffic, parameters, seed)
    return Trace(
        f"synthetic {shape.name}",
        by_rank[:, 0] if source_ranks is None else by_rank.sum(axis=1),
        chosen,
        starts,
        None if source_ranks is None else by_rank,
        np.array(shape.layer_ids, np.int64),
        {
            "model": shape.name,
            "source": "evenmoe.traces.synthesize",
            "top_k": shape.top_k,
            "tokens_per_window": tokens_per_window,
            "requests": requests,
            "request_windows": request_windows,
            **asdict(parameters),
            "seed": seed,
        },
    )


def _parameters(shape: ModelShape, **given: float | None) -> TraceParameters:
    chosen = {name: float(value) for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        highest, rule = _HIGHEST[name]
        if not 0 <= value <= highest:
            raise ConstraintError(
                name, value, f"must be 0 to {rule}", "leave it out for the value of the measured traces"
            )
    return replace(parameters_of(shape), **chosen)


def _check_range(name: str, value: object, low: int, high: int, what: str) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise ConstraintError(
            name, repr(value), f"must be {low} to {high}, {what}", "pass a whole number in that range"
        )


def _check_size(shape: ModelShape, windows: int, ranks: int, tokens: int) -> None:
    cells = shape.num_layers * max(windows * ranks * shape.num_experts, tokens * shape.top_k)
    if 8 * cells > _LARGEST_BYTES:
        raise ConstraintError(
            "num_windows",
            f"{windows}, which makes an array of {cells} numbers",
            f"must keep every array of the trace within {_LARGEST_BYTES // 8} numbers",
            "make fewer windows, ranks or layers, or leave out routing",
        )


def _traffic(num_windows: int, tokens: int, requests: int, request_windows: int, ranks: int) -> _Traffic:
    stream = np.arange(requests)
    # Streams take turns, so that requests end one after the other.
    begun = (np.arange(num_windows)[:, None] + stream * request_windows // requests) // request_windows
    first = np.cumsum(begun[-1] + 1) - (begun[-1] + 1)
    edges = np.arange(requests + 1) * tokens // requests
    owned = np.arange(ranks + 1) * tokens // ranks
    low = np.maximum(edges[:-1], owned[:-1, None])
    high = np.minimum(edges[1:], owned[1:, None])
    return _Traffic(begun + first, int((begun[-1] + 1).sum()), edges, np.maximum(high - low, 0).astype(np.float64))


def _draw_loads(shape: ModelShape, traffic: _Traffic, parameters: TraceParameters, seed: int) -> IntArray:
    """(T, R, L, E), without tokens."""
    windows, ranks = len(traffic.live), len(traffic.parts)
    tokens = traffic.parts.sum(axis=1).astype(np.int64)
    load = np.empty((windows, ranks, shape.num_layers, shape.num_experts), np.int64)
    factors = request_factors(traffic.num_requests, parameters, np.random.default_rng((seed, 0)))
    # A block of windows holds the popularity of all its live requests.
    step = max(1, (1 << 21) // (shape.num_experts * max(traffic.parts.shape)))
    for layer in range(shape.num_layers):
        rng = np.random.default_rng((seed, 1, layer))
        popularity, sticky = layer_popularity(shape.num_experts, factors, parameters, rng)
        picked = pick_probability(popularity, shape.top_k)
        if traffic.requests_per_stream > 1:
            center = picked.mean(axis=0)
            picked = center + (picked - center) / np.sqrt(traffic.requests_per_stream)
        varied = picked * (1 - picked)
        wider = overdispersion(sticky, traffic.edges[-1] / (traffic.live.shape[1] * traffic.requests_per_stream))
        for first in range(0, windows, step):
            live = traffic.live[first : first + step]
            mean = traffic.parts @ picked[live]
            variance = traffic.parts @ varied[live] * wider
            counts = draw_counts(
                mean.reshape(-1, shape.num_experts),
                variance.reshape(-1, shape.num_experts),
                np.tile(tokens, len(live)),
                shape.top_k,
                rng,
            )
            load[first : first + step, :, layer] = counts.reshape(len(live), ranks, -1)
    return load


def _draw_routing(
    shape: ModelShape, traffic: _Traffic, parameters: TraceParameters, seed: int
) -> npt.NDArray[np.uint16]:
    """(tokens, L, K), window by window, in each window stream by stream."""
    starts = _run_starts(traffic)
    chosen = np.empty((int(starts[-1]), shape.num_layers, shape.top_k), np.uint16)
    factors = request_factors(traffic.num_requests, parameters, np.random.default_rng((seed, 0)))
    for layer in range(shape.num_layers):
        rng = np.random.default_rng((seed, 1, layer))
        popularity, sticky = layer_popularity(shape.num_experts, factors, parameters, rng)
        chosen[:, layer] = draw_tokens(
            popularity, sticky, traffic.live.ravel(), starts, shape.top_k, (shape.num_groups, shape.top_groups), rng
        )
    return chosen


def _run_starts(traffic: _Traffic) -> IntArray:
    windows, tokens = len(traffic.live), int(traffic.edges[-1])
    starts = np.arange(windows)[:, None] * tokens + traffic.edges[:-1]
    return np.append(starts.ravel(), windows * tokens)


def _count(chosen: npt.NDArray[np.uint16], traffic: _Traffic, ranks: int, experts: int) -> IntArray:
    """(T, R, L, E): the assignments of each window's tokens by the rank that owns them."""
    windows, tokens = len(traffic.live), int(traffic.edges[-1])
    owner = np.repeat(np.arange(ranks), traffic.parts.sum(axis=1).astype(np.int64))
    row = (np.arange(windows)[:, None] * ranks + owner).reshape(windows * tokens, 1) * experts
    layers = chosen.shape[1]
    load = np.empty((windows * ranks, layers, experts), np.int64)
    for layer in range(layers):
        flat = (row + chosen[:, layer]).ravel()
        load[:, layer] = np.bincount(flat, minlength=windows * ranks * experts).reshape(-1, experts)
    return load.reshape(windows, ranks, layers, experts)


def small_trace(seed: int = 0) -> Trace:
    """4 layers, 32 experts, top-4, 2,048 tokens in 8 windows; popularity falls as 1/rank and drifts between windows.

    Not fitted to any model. Real routing is as skewed: the busiest expert of DeepSeek-V2-Lite has 3.3 to 5.6 times the
    mean, this one's about 4.

    >>> small_trace().load.shape, int(small_trace().load.sum())
    ((8, 4, 32), 32768)
    """
    windows, tokens, layers, experts, top_k = 8, 256, 4, 32, 4
    rng = np.random.default_rng(seed)
    rank = np.stack([rng.permutation(experts) for _ in range(layers)])
    popularity = 1.0 / (1.0 + rank)
    routing = []
    for _ in range(windows):
        drifted = np.log(popularity * rng.lognormal(0.0, 0.3, popularity.shape))
        # Top-k of the log-weights plus Gumbel noise draws k distinct experts in proportion to their weights.
        noise = rng.gumbel(size=(tokens, layers, experts))
        routing.append(np.argsort(-(drifted + noise), axis=-1, kind="stable")[..., :top_k])
    load = np.zeros((windows, layers, experts), np.int64)
    for window, ids in enumerate(routing):
        np.add.at(load[window], (np.arange(layers)[None, :, None], ids), 1)
    return Trace("a small synthetic trace", load, np.concatenate(routing).astype(np.int64))
