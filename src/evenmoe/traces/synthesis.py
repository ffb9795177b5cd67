"""`synthesise`: made-up traces that behave like the measured ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.traces.draw import draw_counts, draw_tokens
from evenmoe.traces.models import ModelShape, find_model
from evenmoe.traces.popularity import (
    Character,
    FloatArray,
    clumping,
    layer_popularity,
    pick_probability,
    request_factors,
)
from evenmoe.traces.profiles import character_of
from evenmoe.traces.trace import Trace

IntArray = npt.NDArray[np.int64]
_LARGEST_BYTES = 1 << 32  # of one array of the trace: what a trace file may hold


@dataclass(frozen=True)
class _Traffic:
    """Which request every token is of.

    Attributes:
        live: int64 (T, requests), the request in every window's places.
        num_requests: requests altogether.
        edges: int64 (requests + 1,), where each place's tokens begin in a window.
        parts: float64 (R, requests), tokens of a place that source rank r owns.
    """

    live: IntArray
    num_requests: int
    edges: IntArray
    parts: FloatArray


def synthesise(
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
    comovement: float | None = None,
    routing: bool = False,
    source_ranks: int | None = None,
    seed: int = 0,
) -> Trace:
    shape = find_model(model) if isinstance(model, str) else model
    if num_layers is not None:
        _check_range("num_layers", num_layers, 1, shape.num_layers, f"the MoE layers of {shape.name}")
        shape = replace(shape, num_layers=num_layers)
    character = _character(shape, skew, drift, locality, comovement)
    _check_range("num_windows", num_windows, 1, 1 << 30, "a count")
    _check_range("tokens_per_window", tokens_per_window, 1, 1 << 40, "a count")
    _check_range("requests", requests, 1, tokens_per_window, "at most one for each token of a window")
    _check_range("request_windows", request_windows, 1, 1 << 30, "a count")
    _check_range("seed", seed, 0, 1 << 63, "a seed")
    if source_ranks is not None:
        _check_range("source_ranks", source_ranks, 1, tokens_per_window, "at most one for each token of a window")
    traffic = _traffic(num_windows, tokens_per_window, requests, request_windows, source_ranks or 1)
    _check_size(shape, num_windows, source_ranks or 1, num_windows * tokens_per_window if routing else 0)
    starts = chosen = None
    if routing:
        chosen = _draw_routing(shape, traffic, character, seed)
        by_rank = _count(chosen, traffic, source_ranks or 1, shape.num_experts)
        starts = _run_starts(traffic)
    else:
        by_rank = _draw_loads(shape, traffic, character, seed)
    return Trace(
        f"synthetic {shape.name}",
        by_rank[:, 0] if source_ranks is None else by_rank.sum(axis=1),
        chosen,
        starts,
        None if source_ranks is None else by_rank,
        np.array(shape.layer_ids, np.int64),
        {
            "model": shape.name,
            "source": "evenmoe.traces.synthesise",
            "top_k": shape.top_k,
            "tokens_per_window": tokens_per_window,
            "requests": requests,
            "request_windows": request_windows,
            **asdict(character),
            "seed": seed,
        },
    )


def _character(shape: ModelShape, *given: float | None) -> Character:
    names = [field.name for field in fields(Character)]
    measured = asdict(character_of(shape)) if None in given else {}
    values = [float(measured[name] if value is None else value) for name, value in zip(names, given, strict=True)]
    for name, value, below, rule in zip(
        names, values, (8.0, 8.0, 1.0, math.inf), ("below 8", "below 8", "below 1", "at most 1"), strict=True
    ):
        if not 0 <= value < below or (name == "comovement" and value > 1):
            raise ConstraintError(
                name, value, f"must be at least 0 and {rule}", "leave it out for the value of the measured traces"
            )
    return Character(*values)


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
    place = np.arange(requests)
    # Places take turns, so that requests end one after the other.
    begun = (np.arange(num_windows)[:, None] + place * request_windows // requests) // request_windows
    first = np.cumsum(begun[-1] + 1) - (begun[-1] + 1)
    edges = np.arange(requests + 1) * tokens // requests
    owned = np.arange(ranks + 1) * tokens // ranks
    low = np.maximum(edges[:-1], owned[:-1, None])
    high = np.minimum(edges[1:], owned[1:, None])
    return _Traffic(begun + first, int((begun[-1] + 1).sum()), edges, np.maximum(high - low, 0).astype(np.float64))


def _draw_loads(shape: ModelShape, traffic: _Traffic, character: Character, seed: int) -> IntArray:
    """(T, R, L, E), without tokens."""
    windows, ranks = len(traffic.live), len(traffic.parts)
    tokens = traffic.parts.sum(axis=1).astype(np.int64)
    load = np.empty((windows, ranks, shape.num_layers, shape.num_experts), np.int64)
    factors = request_factors(traffic.num_requests, character, np.random.default_rng((seed, 0)))
    # A block of windows holds the popularity of all its live requests.
    step = max(1, (1 << 21) // (shape.num_experts * max(traffic.parts.shape)))
    for layer in range(shape.num_layers):
        rng = np.random.default_rng((seed, 1, layer))
        popularity, sticky = layer_popularity(shape.num_experts, factors, character, rng)
        picked = pick_probability(popularity, shape.top_k)
        clumps = clumping(sticky, traffic.edges[-1] / (len(traffic.edges) - 1))
        for first in range(0, windows, step):
            block = picked[traffic.live[first : first + step]]
            mean = traffic.parts @ block
            variance = traffic.parts @ (block * (1 - block)) * clumps
            counts = draw_counts(
                mean.reshape(-1, shape.num_experts),
                variance.reshape(-1, shape.num_experts),
                np.tile(tokens, len(block)),
                shape.top_k,
                rng,
            )
            load[first : first + step, :, layer] = counts.reshape(len(block), ranks, -1)
    return load


def _draw_routing(shape: ModelShape, traffic: _Traffic, character: Character, seed: int) -> npt.NDArray[np.uint16]:
    """(tokens, L, K), window by window, in each window place by place."""
    starts = _run_starts(traffic)
    chosen = np.empty((int(starts[-1]), shape.num_layers, shape.top_k), np.uint16)
    factors = request_factors(traffic.num_requests, character, np.random.default_rng((seed, 0)))
    for layer in range(shape.num_layers):
        rng = np.random.default_rng((seed, 1, layer))
        popularity, sticky = layer_popularity(shape.num_experts, factors, character, rng)
        chosen[:, layer] = draw_tokens(
            popularity, sticky, traffic.live.ravel(), starts, shape.top_k, (shape.num_groups, shape.top_groups), rng
        )
    return chosen


def _run_starts(traffic: _Traffic) -> IntArray:
    windows, tokens = len(traffic.live), int(traffic.edges[-1])
    starts = np.arange(windows)[:, None] * tokens + traffic.edges[:-1]
    return np.append(starts.ravel(), windows * tokens)


def _count(chosen: npt.NDArray[np.uint16], traffic: _Traffic, ranks: int, experts: int) -> IntArray:
    """(T, R, L, E): the picks of each window's tokens by the rank that owns them."""
    windows, tokens = len(traffic.live), int(traffic.edges[-1])
    owner = np.repeat(np.arange(ranks), traffic.parts.sum(axis=1).astype(np.int64))
    row = (np.arange(windows)[:, None] * ranks + owner).reshape(windows * tokens, 1) * experts
    layers = chosen.shape[1]
    load = np.empty((windows * ranks, layers, experts), np.int64)
    for layer in range(layers):
        flat = (row + chosen[:, layer]).ravel()
        load[:, layer] = np.bincount(flat, minlength=windows * ranks * experts).reshape(-1, experts)
    return load.reshape(windows, ranks, layers, experts)
