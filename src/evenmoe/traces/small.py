"""A small made-up trace, for a demonstration without any file."""

from __future__ import annotations

import numpy as np

from evenmoe.traces.trace import Trace


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
