"""Which rows go where, and in which order they are kept there, compiled for tensors on the CPU.

Every function is one pass with counters: keys are few and rows come in order, so nothing is compared. What would lead
outside an array is an IndexError.

Shapes: N assignments, W ranks, L experts per rank, T tokens.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled, compiled_inner


@compiled_inner
def sums_before(counts, before):
    """before[i] = the sum of counts[:i]; returns the sum of all."""
    total = 0
    for i in range(counts.size):
        before[i] = total
        total += counts[i]
    return total


@compiled
def sort_assignments(keys, bound, top_k):
    """Assignments with keys below `bound`, by key, equal ones in their order.

    Args:
        keys: integers (T·K,); those outside 0…bound−1 are left out.

    Returns:
        int64: token, k and key of each, and the number of each key, (bound,).

    >>> import numpy as np
    >>> [a.tolist() for a in sort_assignments(np.array([1, 0, 2, 0]), 2, 2)]
    [[0, 1, 0], [1, 1, 0], [0, 0, 1], [2, 1]]
    """
    counts, following = np.zeros(bound, np.int64), np.empty(bound, np.int64)
    for key in keys:
        if 0 <= key < bound:
            counts[key] += 1
    total = sums_before(counts, following)
    token, k, expert = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    for position in range(keys.size):
        key = keys[position]
        if 0 <= key < bound:
            at = following[key]
            following[key] = at + 1
            token[at], k[at], expert[at] = position // top_k, position % top_k, key
    return token, k, expert, counts


@compiled
def rows_of_tokens(per_rank, token, num_tokens):
    """A row for every token and rank that it goes to, by rank and then token.

    Args:
        per_rank: int64 (W,), assignments of every rank. token: int64 (N,), theirs, by rank.

    Returns:
        int64: rows of every rank (W,); the token of every row; which of its rank's rows each assignment uses (N,).

    >>> import numpy as np
    >>> [a.tolist() for a in rows_of_tokens(np.array([3, 1]), np.array([2, 0, 2, 1]), 3)]
    [[2, 1], [0, 2, 1], [1, 0, 1, 0]]
    """
    if per_rank.sum() != token.size or (per_rank.size and per_rank.min() < 0):
        raise IndexError("other numbers of assignments than there are")
    place = np.empty(num_tokens, np.int64)
    rows = np.zeros(per_rank.size, np.int64)
    sent, used = np.empty(token.size, np.int64), np.empty(token.size, np.int64)
    first = total = 0
    for rank in range(per_rank.size):
        stop = first + per_rank[rank]
        place[:] = -1
        for assignment in range(first, stop):
            if not 0 <= token[assignment] < num_tokens:
                raise IndexError("a token of no row")
            place[token[assignment]] = 0
        for which in range(num_tokens):
            if place[which] == 0:
                place[which] = rows[rank]
                sent[total] = which
                rows[rank] += 1
                total += 1
        for assignment in range(first, stop):
            used[assignment] = place[token[assignment]]
        first = stop
    return rows, sent[:total], used


@compiled
def order_received(counts, first, numbers):
    """Received assignments by local expert, then source, each source's in its order.

    Args:
        counts: int64 (W, L), of every source for every local expert. first: int64 (W,), the first row of every source.
        numbers: int32 (N, 3 or more), by source and local expert: token, k, which of the source's rows, and more.

    Returns:
        int64 (N,), the row of each; int32 (N,), its source; int32 (N, 3 or more), its numbers.
    """
    places = np.empty(counts.shape, np.int64)
    total = 0
    for source in range(counts.shape[0]):
        for expert in range(counts.shape[1]):
            if counts[source, expert] < 0:
                raise IndexError("a count below 0")
            places[source, expert] = total
            total += counts[source, expert]
    if total != numbers.shape[0] or counts.shape[0] > first.size or numbers.shape[1] < 3:
        raise IndexError("other numbers of assignments than have come")
    row, origin = np.empty(total, np.int64), np.empty(total, np.int32)
    ordered = np.empty((total, numbers.shape[1]), np.int32)
    into = 0
    for expert in range(counts.shape[1]):
        for source in range(counts.shape[0]):
            start = places[source, expert]
            for at in range(start, start + counts[source, expert]):
                for column in range(numbers.shape[1]):
                    ordered[into, column] = numbers[at, column]
                row[into] = first[source] + numbers[at, 2]
                origin[into] = source
                into += 1
    return row, origin, ordered


@compiled
def order_by_source(source, world_size):
    """Positions of rows by the rank that they came from, each rank's in their order, and the number of each rank's.

    Rows of ranks outside 0…W−1 are left out.

    >>> import numpy as np
    >>> [a.tolist() for a in order_by_source(np.array([1, 0, 1], np.int32), 3)]
    [[1, 0, 2], [1, 2, 0]]
    """
    counts, following = np.zeros(world_size, np.int64), np.empty(world_size, np.int64)
    for rank in source:
        if 0 <= rank < world_size:
            counts[rank] += 1
    total = sums_before(counts, following)
    order = np.empty(total, np.int64)
    for position in range(source.size):
        rank = source[position]
        if 0 <= rank < world_size:
            order[following[rank]] = position
            following[rank] += 1
    return order, counts
