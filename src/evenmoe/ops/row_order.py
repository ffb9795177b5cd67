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
    counts, found = np.zeros(bound, np.int64), np.empty((3, keys.size), np.int64)
    total = _sort_assignments(keys, top_k, counts, found)
    return found[0, :total], found[1, :total], found[2, :total], counts


@compiled
def _sort_assignments(keys, top_k, counts, found):
    bound, following = counts.size, np.empty(counts.size, np.int64)
    for key in keys:
        if 0 <= key < bound:
            counts[key] += 1
    total = sums_before(counts, following)
    for position in range(keys.size):
        key = keys[position]
        if 0 <= key < bound:
            at = following[key]
            following[key] = at + 1
            found[0, at], found[1, at], found[2, at] = position // top_k, position % top_k, key
    return total


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
    numbers, sent = np.zeros((2, counts.shape[0]), np.int64), np.empty(token.size, np.int64)
    assignments = np.empty((token.size, 3), np.int32)
    total = _rows_of_tokens(counts, token, k, num_tokens, numbers, sent, assignments)
    return numbers[0], numbers[1], sent[:total], assignments


@compiled
def _rows_of_tokens(counts, token, k, num_tokens, numbers, sent, assignments):
    world_size, (per_rank, rows) = counts.shape[0], numbers
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
    return total


def order_received(counts, first, numbers):
    """Received assignments by local expert, then source, each source's in its order.

    Args:
        counts: int64 (W, L), of every source for every local expert. first: int64 (W,), the first row of every source.
        numbers: int32 (N, 3 or more), by source and local expert: token, k, which of the source's rows, and more.

    Returns:
        int64 (N,), the row of each; int32 (N,), its source; int32 (N, 3 or more), its numbers.
    """
    total = numbers.shape[0]
    row, origin, ordered = np.empty(total, np.int64), np.empty(total, np.int32), np.empty(numbers.shape, np.int32)
    _order_received(counts, first, numbers, row, origin, ordered)
    return row, origin, ordered


@compiled
def _order_received(counts, first, numbers, row, origin, ordered):
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


def order_by_source(source, world_size):
    """Positions of rows by the rank that they came from, each rank's in their order, and the number of each rank's.

    Rows of ranks outside 0…W−1 are left out.

    >>> import numpy as np
    >>> [a.tolist() for a in order_by_source(np.array([1, 0, 1], np.int32), 3)]
    [[1, 0, 2], [1, 2, 0]]
    """
    counts, order = np.zeros(world_size, np.int64), np.empty(source.size, np.int64)
    return order[: _order_by_source(source, counts, order)], counts


@compiled
def _order_by_source(source, counts, order):
    world_size, following = counts.size, np.empty(counts.size, np.int64)
    for rank in source:
        if 0 <= rank < world_size:
            counts[rank] += 1
    total = sums_before(counts, following)
    for position in range(source.size):
        rank = source[position]
        if 0 <= rank < world_size:
            order[following[rank]] = position
            following[rank] += 1
    return total


@compiled
def positions_returned(counts, came, token, k, position):
    """Positions of rows that return in the order in which assignments were sent; whether as many came as were sent.

    Args:
        counts: int64 (W, L), assignments that were sent to every rank and local expert. came: int64 (W, 1), the rows
            that each says it returns.
        token, k: int64 (N,), of the assignments. position: int64 (T, K), to be written; −1 where none is sent.

    >>> import numpy as np
    >>> position, counts, token, k = np.zeros((2, 2), np.int64), np.array([[1, 1]]), np.array([1, 0]), np.array([0, 1])
    >>> positions_returned(counts, np.array([[2]]), token, k, position), position.tolist()
    (True, [[-1, 1], [0, -1]])
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
    for row in range(position.shape[0]):
        for column in range(position.shape[1]):
            position[row, column] = -1
    for i in range(token.size):
        if not (0 <= token[i] < position.shape[0] and 0 <= k[i] < position.shape[1]):
            raise IndexError("an assignment that there is not")
        position[token[i], k[i]] = i
    return True


@compiled
def rows_of_sums(which, k, weights, position, weight):
    """The rows of each sum, k ascending, and what they are weighted by.

    Args:
        which: int64 (N,), the sum that each row belongs to. k: int32 (N,), that differ within a sum. weights: (N,).
        position: int64 (P, K), to be written, −1 behind a sum's last row. weight: (P, K), likewise.

    >>> import numpy as np
    >>> position, weight = np.zeros((2, 3), np.int64), np.zeros((2, 3))
    >>> rows_of_sums(np.array([1, 0, 1]), np.array([2, 1, 0]), np.array([0.5, 2.0, 4.0]), position, weight)
    >>> position.tolist(), weight[1].tolist()
    ([[1, -1, -1], [2, 0, -1]], [4.0, 0.5, 0.0])
    """
    for row in range(position.shape[0]):
        for column in range(position.shape[1]):
            position[row, column], weight[row, column] = -1, 0.0
    for i in range(which.size):
        if not (0 <= which[i] < position.shape[0] and 0 <= k[i] < position.shape[1]):
            raise IndexError("a row of no sum")
        position[which[i], k[i]], weight[which[i], k[i]] = i, weights[i]
    # Without gaps, so that four rows can be added in one pass.
    for row in range(position.shape[0]):
        into = 0
        for column in range(position.shape[1]):
            at, factor = position[row, column], weight[row, column]
            if at >= 0:
                position[row, column], weight[row, column] = -1, 0.0
                position[row, into], weight[row, into] = at, factor
                into += 1


@compiled
def least_and_most(ids):
    """The least and the largest of integers (n,), of which there are some.

    >>> import numpy as np
    >>> least_and_most(np.array([3, -1, 2]))
    (-1, 3)
    """
    least = most = ids[0]
    for one in ids:
        least, most = min(least, one), max(most, one)
    return least, most
