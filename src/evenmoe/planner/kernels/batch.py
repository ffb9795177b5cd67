"""The compiled part of planning for the `batch` rule: peaks after the best splits.

Loads are in units of the mean rank load, so 1.0 is the peak that nothing can beat. N scenarios, E experts, G ranks with
n slots each. A set of ranks is *closed* if no other rank holds the experts with tokens on it: however a batch is
split, its busiest rank has at least the set's mean. The best split's peak is the largest such mean (max-flow min-cut),
and the ranks that the busiest ones can still send tokens to are a set that attains it.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled, compiled_inner

# A peak counts as the best once no rank that the busiest can send to is emptier by more than this.
_TOLERANCE = 2e-4
# Sweeps of water-filling before chains are leveled, and rounds of that at most: a split that needs more stays above.
_SWEEPS = 3
_ROUNDS = 100
# A floor may be above a peak by the flows that count as none, 1e-7 on each of some hundred edges, in 32 scenarios.
_LEAK = 1e-3


@compiled
def _edges(held, num_experts):
    """The experts with a choice of rank, as rows of edges: one edge for each rank that holds the expert.

    Returns:
        home: int64 (E,), the first rank that holds each expert.
        row_of: int64 (E,), the row of each expert, or −1 if one rank holds it.
        first: int64 (R + 1,), the edges of row r are first[r] … first[r + 1] − 1.
        rank_of, row_of_edge: int64 (H,), the rank and the row of each edge.
        first_at: int64 (G + 1,) and at: int64 (H,), the edges at each rank.
    """
    num_ranks, width = held.shape
    count = np.zeros(num_experts, np.int64)
    home = np.zeros(num_experts, np.int64)
    last = np.full(num_experts, -1, np.int64)
    for rank in range(num_ranks):
        for slot in range(width):
            expert = held[rank, slot]
            if last[expert] != rank:
                last[expert] = rank
                home[expert] = rank if count[expert] == 0 else home[expert]
                count[expert] += 1
    row_of = np.full(num_experts, -1, np.int64)
    first = np.zeros(held.size + 1, np.int64)
    rows = 0
    for expert in range(num_experts):
        if count[expert] > 1:
            row_of[expert] = rows
            first[rows + 1] = first[rows] + count[expert]
            rows += 1
    rank_of = np.empty(first[rows], np.int64)
    row_of_edge = np.empty(first[rows], np.int64)
    first_at = np.zeros(num_ranks + 1, np.int64)
    at = np.empty(first[rows], np.int64)
    filled = first.copy()
    size = 0
    for rank in range(num_ranks):
        for slot in range(width):
            row = row_of[held[rank, slot]]
            if row >= 0 and (filled[row] == first[row] or rank_of[filled[row] - 1] != rank):
                edge = filled[row]
                rank_of[edge] = rank
                row_of_edge[edge] = row
                at[size] = edge
                filled[row] += 1
                size += 1
        first_at[rank + 1] = size
    return home, row_of, first[: rows + 1], rank_of, row_of_edge, first_at, at


@compiled_inner
def _highest(load):
    """The highest load; `load.max()` makes an array first."""
    peak = load[0]
    for rank in range(1, load.size):
        peak = max(peak, load[rank])
    return peak


@compiled_inner
def _fill(begin, end, rank_of, flow, load):
    """Water-filling: give one expert's tokens anew to the ranks that hold it, up to a common water level."""
    if end - begin == 2:
        _fill_two(begin, rank_of, flow, load)
        return
    tokens = 0.0
    total = 0.0
    for edge in range(begin, end):
        tokens += flow[edge]
        load[rank_of[edge]] -= flow[edge]
        total += load[rank_of[edge]]
    count = end - begin
    level = (total + tokens) / count
    while True:
        kept = 0
        total = tokens
        for edge in range(begin, end):
            if load[rank_of[edge]] < level:
                kept += 1
                total += load[rank_of[edge]]
        if kept >= count or kept == 0:
            break
        count = kept
        level = total / count
    for edge in range(begin, end):
        flow[edge] = max(level - load[rank_of[edge]], 0.0)
        load[rank_of[edge]] += flow[edge]


@compiled_inner
def _fill_two(edge, rank_of, flow, load):
    """`_fill` for two ranks, as most replicated experts have, to the last bit and in half of the time."""
    one, other = rank_of[edge], rank_of[edge + 1]
    tokens = flow[edge] + flow[edge + 1]
    low, high = load[one] - flow[edge], load[other] - flow[edge + 1]
    level = (low + high + tokens) / 2
    if (low < level) != (high < level):
        level = tokens + (low if low < level else high)
    flow[edge] = max(level - low, 0.0)
    flow[edge + 1] = max(level - high, 0.0)
    load[one] = low + flow[edge]
    load[other] = high + flow[edge + 1]


@compiled_inner
def _spread(first, rank_of, row_of_edge, first_at, at, flow, load, closed, queue, via, seen):
    """Mark in `closed` the ranks that the busiest can send tokens to; returns how many they are.

    `queue` lists them, nearest first; via[rank] is the edge that gives and the edge that takes on the last step to it.
    `seen` is overwritten, bool, one for each row.
    """
    seen[:] = False
    peak = _highest(load)
    size = 0
    for rank in range(load.size):
        closed[rank] = load[rank] >= peak - 0.5 * _TOLERANCE
        if closed[rank]:
            via[rank, 0] = -1
            queue[size] = rank
            size += 1
    head = 0
    while head < size:
        rank = queue[head]
        head += 1
        for i in range(first_at[rank], first_at[rank + 1]):
            give = at[i]
            row = row_of_edge[give]
            if seen[row] or flow[give] < 1e-7:
                continue
            seen[row] = True
            for take in range(first[row], first[row + 1]):
                if not closed[rank_of[take]]:
                    closed[rank_of[take]] = True
                    via[rank_of[take], 0] = give
                    via[rank_of[take], 1] = take
                    queue[size] = rank_of[take]
                    size += 1
    return size


@compiled_inner
def _settle(first, rank_of, row_of_edge, first_at, at, flow, load, closed, queue, via, seen):
    """Lower the peak of one scenario to its best, starting from any split; returns it."""
    for _ in range(_SWEEPS):
        for row in range(first.size - 1):
            _fill(first[row], first[row + 1], rank_of, flow, load)
        peak = _highest(load)
        if peak < 1.0 + _TOLERANCE:
            closed[:] = True
            return max(peak, 1.0)
    for _ in range(_ROUNDS):
        size = _spread(first, rank_of, row_of_edge, first_at, at, flow, load, closed, queue, via, seen)
        goal = 0.0
        low = load[queue[0]]
        for i in range(size):
            goal += load[queue[i]]
            low = min(low, load[queue[i]])
        peak = _highest(load)
        if low >= peak - _TOLERANCE:
            return peak
        goal /= size
        for i in range(size - 1, -1, -1):
            rank = queue[i]
            give, take = via[rank]
            if give >= 0:
                amount = min(max(load[rank] - goal, -flow[give]), flow[take])
                flow[take] -= amount
                flow[give] += amount
                load[rank] -= amount
                load[rank_of[give]] += amount
        for row in range(first.size - 1):
            _fill(first[row], first[row + 1], rank_of, flow, load)
    return _highest(load)


@compiled
def evaluate(held, tokens, floors, order, limit):
    """Peak of every scenario after its best split.

    Args:
        held: int64 (G, n), the expert in each slot.
        tokens: float64 (N, E), mean rank load 1 in every scenario.
        floors: float64 (N,), what the peaks are at least: 1, or more where a move's bound says so.
        order: int64 (N,), in which scenarios are looked at: those first whose peaks may be far above their floors. What
            is returned does not depend on it.
        limit: stop as soon as the sum of the peaks must exceed this.

    Returns:
        total: the sum of the peaks, or infinity if above the limit.
        peaks: float64 (N,); these three hold nothing where it is infinity.
        closed: bool (N, G), a set of ranks whose mean is the peak; all of them where the peak is 1.
        load: float64 (N, G), rank loads after the split; those below the peak are not minimized.
    """
    num_scenarios = tokens.shape[0]
    num_ranks = held.shape[0]
    home, row_of, first, rank_of, row_of_edge, first_at, at = _edges(held, tokens.shape[1])
    load = np.empty((num_scenarios, num_ranks))
    closed = np.empty((num_scenarios, num_ranks), np.bool_)
    peaks = np.empty(num_scenarios)
    flow = np.empty(rank_of.size)
    seen = np.empty(first.size, np.bool_)
    queue = np.empty(num_ranks, np.int64)
    via = np.empty((num_ranks, 2), np.int64)
    total = 0.0
    to_come = floors.sum()
    for scenario in order:
        here = load[scenario]
        here[:] = 0.0
        flow[:] = 0.0
        for expert in range(tokens.shape[1]):
            here[home[expert]] += tokens[scenario, expert]
            if row_of[expert] >= 0:
                flow[first[row_of[expert]]] = tokens[scenario, expert]
        peaks[scenario] = _settle(
            first, rank_of, row_of_edge, first_at, at, flow, here, closed[scenario], queue, via, seen
        )
        total += peaks[scenario]
        to_come -= floors[scenario]
        if total + to_come > limit + _LEAK:
            return np.inf, peaks, closed, load
    total = 0.0  # once more, since the last bits of a sum depend on its order
    to_come = floors.sum()
    for scenario in range(num_scenarios):
        total += peaks[scenario]
        to_come -= floors[scenario]
        if total + to_come > limit:
            return np.inf, peaks, closed, load
    return total, peaks, closed, load


@compiled
def first_better(held, hot, moves, floors, tokens, peaks, limit, price):
    """Try moves of rank `hot` one after the other, until one lowers the sum of the peaks below `limit` and its price.

    Args:
        held, tokens: as for `evaluate`.
        moves: int64 (M, 5), M > 0, and floors: float64 (M, N), as `batch_moves.candidates` fills them.
        peaks: float64 (N,), of `held`.
        limit: what the sum has to stay within.
        price: how much further each copy has to lower it.

    Returns:
        tried: how many moves.
        trial: int64 (G, n), `held` after the last of them.
        total, peaks, closed, load: of `trial`, as `evaluate` returns them; infinity where no move was good enough.
    """
    order = np.empty(peaks.size, np.int64)
    tried = 0
    while True:
        mine, rank, theirs, keeps = moves[tried, 0], moves[tried, 1], moves[tried, 2], moves[tried, 3]
        trial = held.copy()
        trial[rank, theirs] = held[hot, mine]
        if keeps == 0:
            trial[hot, mine] = held[rank, theirs]
        _doubtful_first(floors[tried], peaks, order)
        within = limit - price * max(moves[tried, 4], 0)
        total, after, closed, load = evaluate(trial, tokens, floors[tried], order, within)
        tried += 1
        if total < np.inf or tried == moves.shape[0]:
            return tried, trial, total, after, closed, load


@compiled_inner
def _doubtful_first(floors, peaks, order):
    """Fill `order` (N,) with the scenarios by how little of their peaks is certain to stay; ties in their order."""
    for scenario in range(order.size):
        place = scenario
        gain = floors[scenario] - peaks[scenario]
        while place > 0 and floors[order[place - 1]] - peaks[order[place - 1]] > gain:
            order[place] = order[place - 1]
            place -= 1
        order[place] = scenario
