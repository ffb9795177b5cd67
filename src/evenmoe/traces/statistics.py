"""What a trace is like: skew, drift between windows, factors that experts have in common, locality between tokens.

Shapes: T windows, L layers, E experts, K experts per token. A share is an expert's part of its layer's load.
Numbers of two traces compare where their windows hold about as many tokens: what is left of sampling noise is alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray, as_load, peak_over_mean


def skew(load: npt.ArrayLike) -> FloatArray:
    """The busiest expert's load over the mean expert's, all windows together.

    Args:
        load: tokens per expert, (T, L, E) or (L, E).

    Returns:
        float64 (L,), 1.0 to E; 1.0 for a layer without load.

    The busiest expert has 6 of 8 tokens, the mean of four is 2:

    >>> skew([[[4, 1, 0, 0]], [[2, 0, 1, 0]]]).tolist()
    [3.0]
    """
    return peak_over_mean(_windows(load).sum(axis=0))


def gini(load: npt.ArrayLike) -> FloatArray:
    """Gini coefficient of the experts' loads, all windows together: 0 when all are alike, 1 - 1/E when one has it all.

    It is half the mean difference between two experts' loads, over the mean load; unlike the maximum it looks at all
    experts.

    Args:
        load: tokens per expert, (T, L, E) or (L, E).

    Returns:
        float64 (L,); 0 for a layer without load.

    The differences between 3, 1, 0, 0 are 2, 3, 3, 1, 1, 0 and back, 20 over 16 pairs; half of that over the mean of 1:

    >>> gini([[3, 1, 0, 0]]).tolist()
    [0.625]
    """
    total = np.sort(_windows(load).sum(axis=0), axis=-1)
    experts = total.shape[-1]
    weight = 2 * np.arange(1, experts + 1) - experts - 1
    tokens = total.sum(axis=-1)
    return np.divide((weight * total).sum(axis=-1), experts * tokens, out=np.zeros_like(tokens), where=tokens > 0)


def drift(load: npt.ArrayLike) -> FloatArray:
    """How far an expert's share in one window is from its share in all: relative standard deviation over windows.

    The square is the mean over windows of Σ (p - q)² / q over experts, p the share in the window and q in all windows:
    the relative variance of an expert's share, weighted by its share. What drawing n assignments at random adds to it,
    Σ (1 - q) / n, is taken off, and a negative rest counts as 0. Assignments that resemble their neighbors add more
    than that, so short windows of tokens with much `locality` drift more than long ones.

    Args:
        load: tokens per expert, (T, L, E); windows without load in a layer do not count there.

    Returns:
        float64 (L,), 0 for no drift; √(E - 1) when every window has one expert to itself. 0 for a single window.

    Shares of 3/4 and 1/4 around 1/2: (1/16 + 1/16) / (1/2) = 1/4, less (1/2 + 1/2) / 10,000 for noise:

    >>> drift([[[7500, 2500]], [[2500, 7500]]]).round(4).tolist()
    [0.4999]
    """
    share, mean, assigned = _shares(load)
    used = assigned > 0
    apart = np.divide((share - mean) ** 2, mean, out=np.zeros_like(share), where=mean > 0).sum(axis=-1)
    noise = np.divide(((1 - mean) * (mean > 0)).sum(axis=-1), assigned, out=np.zeros_like(assigned), where=used)
    windows = np.maximum(used.sum(axis=0), 1)
    return np.sqrt(np.maximum(((apart - noise) * used).sum(axis=0) / windows, 0.0))


def common_factor_share(load: npt.ArrayLike, num_factors: int = 4) -> float:
    """How much of the drift `num_factors` common factors explain: experts of all layers that gain and lose together.

    The deviations (p - q) / √q of all layers and experts, window by window, are a matrix of T rows; the result is the
    share of its squared length in its first singular vectors. Sampling noise is part of the matrix.

    Args:
        load: tokens per expert, (T, L, E).
        num_factors: at least 1.

    Returns:
        0.0 to 1.0; 1.0 where nothing drifts.

    Two experts that change places in both layers are one factor:

    >>> common_factor_share([[[3, 1], [1, 3]], [[1, 3], [3, 1]]], num_factors=1)
    1.0

    Four windows, two layers that do so independently, are two:

    >>> both = [[[3, 1], [3, 1]], [[1, 3], [3, 1]], [[3, 1], [1, 3]], [[1, 3], [1, 3]]]
    >>> round(common_factor_share(both, num_factors=1), 6)
    0.5
    """
    if num_factors < 1:
        raise ConstraintError("num_factors", num_factors, "must be at least 1", "4 is the default")
    share, mean, assigned = _shares(load)
    scaled = np.divide(
        share - mean, np.sqrt(mean), out=np.zeros_like(share), where=(mean > 0) & (assigned > 0)[..., None]
    )
    matrix = scaled.reshape(len(scaled), -1)
    # The smaller of the two matrices of products: MMLU's 14,042 windows of 256 numbers would be 1.6 GB the other way.
    products = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    lengths = np.maximum(np.linalg.eigvalsh(products)[::-1], 0.0)
    return float(lengths[:num_factors].sum() / lengths.sum()) if lengths.sum() > 0 else 1.0


def locality(routing: npt.ArrayLike, seq_start: npt.ArrayLike | None = None, *, lag: int = 1) -> FloatArray:
    """How much likelier two tokens `lag` apart share an expert than two tokens anywhere in the same request.

    Args:
        routing: integers (tokens, L, K), distinct experts per token and layer.
        seq_start: integers (requests + 1,), the first token of each request and, last, the number of tokens; or None
            for one request. Requests of `lag` tokens or fewer do not count.
        lag: tokens from one to the other, at least 1.

    Returns:
        float64 (L,): experts shared by pairs `lag` apart, over those expected if each request's tokens were shuffled.
        1.0 is independence, and the value where nothing is expected.

    Tokens to experts 0, 0, 1, 1: of three neighbors two pairs agree; of the six pairs of tokens also two do:

    >>> locality([[[0]], [[0]], [[1]], [[1]]]).tolist()
    [2.0]
    """
    if lag < 1:
        raise ConstraintError("lag", lag, "must be at least 1", "1 compares neighbors")
    chosen = np.asarray(routing)
    starts = np.array([0, len(chosen)]) if seq_start is None else np.asarray(seq_start)
    experts = int(chosen.max(initial=0)) + 1
    shared = np.zeros(chosen.shape[1])
    expected = np.zeros(chosen.shape[1])
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        tokens = stop - start
        if tokens <= lag:
            continue
        one_hot = np.zeros((tokens, chosen.shape[1], experts), np.float32)
        np.put_along_axis(one_hot, chosen[start:stop].astype(np.intp), 1.0, axis=2)
        shared += np.einsum("tle,tle->l", one_hot[:-lag], one_hot[lag:], dtype=np.float64)
        counts = one_hot.sum(axis=0, dtype=np.float64)
        pairs = (counts * (counts - 1)).sum(axis=-1) / (tokens * (tokens - 1))
        expected += (tokens - lag) * pairs
    return np.divide(shared, expected, out=np.ones_like(shared), where=expected > 0)


def _windows(load: npt.ArrayLike) -> FloatArray:
    tokens = as_load(load)
    return tokens if tokens.ndim == 3 else tokens[None]


def _shares(load: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Shares (T, L, E) of each window, (L, E) of all windows together, and token–expert assignments (T, L)."""
    tokens = _windows(load)
    assigned = tokens.sum(axis=-1)
    total = tokens.sum(axis=0)
    share = np.divide(tokens, assigned[..., None], out=np.zeros_like(tokens), where=assigned[..., None] > 0)
    together = total.sum(axis=-1, keepdims=True)
    return share, np.divide(total, together, out=np.zeros_like(total), where=together > 0), assigned
