"""Loads as the tables' collector draws them: truncated power-law shares of experts, the busiest rank in front.

aiconfigurator's collector (Apache-2.0, `collector/helper.py`) stores no seeds, so a row's loads are known only as draws
of the same distribution. Two generations of it repair what rounding and the limit of one assignment per token and
expert left over: the earlier hands it out from the least loaded expert up, which may land on one rank; the later in
turn, one a rank.
"""

from __future__ import annotations

from typing import Literal

import numba
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Generation = Literal["earlier", "later"]


def draw_counts(
    rng: np.random.Generator, tokens: int, num_experts: int, top_k: int, num_ranks: int, alpha: float, how: Generation
) -> IntArray:
    """Assignments of every expert, int64 (E,), in all `tokens · top_k` and at most `tokens` each."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > num_experts else (0.01, 2.0)
    power = 1.0 - alpha
    uniform = rng.random(num_experts)
    weights = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    counts = np.rint(weights / weights.sum() * (tokens * top_k)).astype(np.int64)
    over = int(np.maximum(counts - tokens, 0).sum())
    np.minimum(counts, tokens, out=counts)
    if how == "later":
        _in_turn(counts, num_ranks, over, tokens)
        _in_turn(counts, num_ranks, tokens * top_k - int(counts.sum()), tokens)
    else:
        _from_the_least(counts, np.argsort(-counts, kind="stable"), tokens * top_k - int(counts.sum()), tokens)
    return counts


def busiest(counts: IntArray, num_ranks: int) -> IntArray:
    """Assignments of the rank with most, whose experts are neighbors: int64 (E / G,).

    >>> busiest(np.array([1, 2, 5, 0]), 2).tolist()
    [5, 0]
    """
    by_rank = counts.reshape(num_ranks, -1)
    return by_rank[int(by_rank.sum(axis=1).argmax())]


@numba.njit(cache=True)
def _in_turn(counts, num_ranks, number, limit):  # pragma: no cover
    """Add (or take, if negative) so many, one a rank in turn: to its least, from its largest."""
    width, step, left = counts.size // num_ranks, (1 if number > 0 else -1), abs(number)
    while left > 0:
        before = left
        for rank in range(num_ranks):
            best = -1
            for expert in range(rank * width, (rank + 1) * width):
                if step > 0:
                    if counts[expert] < limit and (best < 0 or counts[expert] < counts[best]):
                        best = expert
                elif counts[expert] > 0 and (best < 0 or counts[expert] > counts[best]):
                    best = expert
            if best >= 0:
                counts[best] += step
                left -= 1
                if left == 0:
                    break
        if left == before:
            break


@numba.njit(cache=True)
def _from_the_least(counts, order, number, limit):  # pragma: no cover
    """Add (or take) so many one by one along `order` from its end, again and again."""
    position = 0
    while number > 0:
        expert = order[counts.size - 1 - position % counts.size]
        if counts[expert] < limit:
            counts[expert] += 1
            number -= 1
        position += 1
    for taken in range(-number):
        expert = order[counts.size - 1 - taken % counts.size]
        if counts[expert] > 0:
            counts[expert] -= 1
        else:
            counts[np.argmax(counts)] -= 1


def distinct_tokens(counts: IntArray, tokens: int, mine: npt.NDArray[np.bool_]) -> int:
    """Tokens that have an assignment to an expert of `mine`, bool (E,), as the collector gives experts to tokens.

    Experts, the most loaded first, fill one column of tokens after the other; an expert that ends a column goes on at
    the top of the next.

    >>> distinct_tokens(np.array([4, 1, 3, 2]), 5, np.array([False, True, True, False]))
    4
    """
    order = np.argsort(-counts, kind="stable")
    ends = np.cumsum(counts[order])
    change = np.zeros(tokens + 1, np.int64)
    for expert, end in zip(order, ends, strict=True):
        number = int(counts[expert])
        if not mine[expert] or not number:
            continue
        first = (int(end) - number) % tokens
        last = first + number
        change[first] += 1
        change[min(last, tokens)] -= 1
        if last > tokens:
            change[0] += 1
            change[last - tokens] -= 1
    return int((np.cumsum(change[:-1]) > 0).sum())
