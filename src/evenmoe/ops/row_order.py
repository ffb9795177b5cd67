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
def rows_of_tokens(counts, token, k, num_tokens):
    """A row for every token and rank that it goes to, by rank and then token.

    Args:
        counts: int64 (W, L), assignments of every rank and local expert. token, k: int64 (N,), theirs, by rank.

    Returns:
        int64: assignments and rows of every rank, (W,) each; the token of every row; int32 (N, 3), token, k, and which
        of its rank's rows each assignment uses.

    >>> import numpy as np
    >>> counts, token, k = np.array([[2, 1], [1, 0]]), np.array([2, 0, 2, 1]), np.array([0, 0, 1, 0])
    >>> [a.tolist() for a in rows_of_tokens(counts, token, k, 3)]
    [[3, 1], [2, 1], [0, 2, 1], [[2, 0, 1], [0, 0, 0], [2, 1, 1], [1, 0, 0]]]
    """
    world_size = counts.shape[0]
    per_rank, rows = np.zeros(world_size, np.int64), np.zeros(world_size, np.int64)
    number = 0
    for rank in range(world_size):
        for expert in range(counts.shape[1]):
            if counts[rank, expert] < 0:
                raise IndexError("a count below 0")
            per_rank[rank] += counts[rank, expert]
        number += per_rank[rank]
    if number != token.size or k.size != token.size:
        raise IndexError("other numbers of assignments than there are")
    place = np.empty(num_tokens, np.int64)
    sent, assignments = np.empty(token.size, np.int64), np.empty((token.size, 3), np.int32)
    first = total = 0
    for rank in range(world_size):
        stop = first + per_rank[rank]
        for which in range(num_tokens):
            place[which] = -1
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
            assignments[assignment, 0], assignments[assignment, 1] = token[assignment], k[assignment]
            assignments[assignment, 2] = place[token[assignment]]
        first = stop
    return per_rank, rows, sent[:total], assignments


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


@compiled
def positions_returned(counts, came, token, k, top_k, position):
    """Positions of rows that return in the order in which assignments were sent; whether as many came as were sent.

    Args:
        counts: int64 (W, L), assignments that were sent to every rank and local expert. came: int64 (W, 1), the rows
            that each says it returns.
        token, k: int64 (N,), of the assignments. position: int64 (T·K,), −1 where none is sent; changed in place.

    >>> import numpy as np
    >>> position = np.full(4, -1)
    >>> counts, token, k = np.array([[1, 1]]), np.array([1, 0]), np.array([0, 1])
    >>> positions_returned(counts, np.array([[2]]), token, k, 2, position), position.tolist()
    (True, [-1, 1, 0, -1])
    """
    number = 0
    for rank in range(counts.shape[0]):
        sent = 0
        for expert in range(counts.shape[1]):
            sent += counts[rank, expert]
        if sent != came[rank, 0]:
            return False
        number += sent
    if number != token.size:
        raise IndexError("other numbers of assignments than there are")
    for i in range(token.size):
        at = token[i] * top_k + k[i]
        if not 0 <= at < position.size:
            raise IndexError("an assignment that there is not")
        position[at] = i
    return True
