"""Moves worth trying in planning for the `batch` rule, by what is left of a closed set's bound after each.

Units, letters and closed sets as in `planner.kernels.batch`.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled, compiled_inner
from evenmoe.planner.kernels.packing import held_experts


@compiled
def _cut(held, tokens, closed, load):
    """What a move's bound is made of.

    Returns:
        holders: int64 (E,), how many ranks hold each expert.
        outside: int64 (E, N), how many of them are not in the scenario's closed set.
        fixed: float64 (G, N), tokens of experts that only this rank holds.
        cut: float64 (2, N), load and size of the closed set.
    """
    num_experts, num_scenarios = tokens.shape
    num_ranks, width = held.shape
    holders = np.zeros(num_experts, np.int64)
    outside = np.zeros((num_experts, num_scenarios), np.int64)
    fixed = np.zeros((num_ranks, num_scenarios))
    cut = np.zeros((2, num_scenarios))
    for rank in range(num_ranks):
        for slot in range(width):
            holders[held[rank, slot]] += 1
            for s in range(num_scenarios):
                outside[held[rank, slot], s] += not closed[s, rank]
    for rank in range(num_ranks):
        for slot in range(width):
            if holders[held[rank, slot]] == 1:
                for s in range(num_scenarios):
                    fixed[rank, s] += tokens[held[rank, slot], s]
        for s in range(num_scenarios):
            if closed[s, rank]:
                cut[0, s] += load[s, rank]
                cut[1, s] += 1.0
    return holders, outside, fixed, cut


@compiled_inner
def _bound_of_swap(a, b, i, j, tokens, closed, holders, outside, fixed, cut, limit, floors):
    """Lower bound on the sum of the peaks when rank i gives expert a to rank j for expert b; stops above `limit`.

    Fills `floors` (N,), the bounds of the scenarios."""
    total = float(cut.shape[1])
    for s in range(cut.shape[1]):
        inside = cut[0, s]
        of_i, of_j = fixed[i, s], fixed[j, s]
        if holders[a] == 1:
            of_i -= tokens[a, s]
            of_j += tokens[a, s]
        if holders[b] == 1:
            of_i += tokens[b, s]
            of_j -= tokens[b, s]
        if closed[s, i] and not closed[s, j]:
            inside -= tokens[a, s] if outside[a, s] == 0 else 0.0
            inside += tokens[b, s] if outside[b, s] == 1 else 0.0
        elif closed[s, j] and not closed[s, i]:
            inside += tokens[a, s] if outside[a, s] == 1 else 0.0
            inside -= tokens[b, s] if outside[b, s] == 0 else 0.0
        floors[s] = max(1.0, inside / cut[1, s], of_i, of_j)
        total += floors[s] - 1.0
        if total > limit:
            break
    return total


@compiled_inner
def _bound_of_change(a, b, i, j, tokens, closed, holders, outside, fixed, cut, limit, floors):
    """As `_bound_of_swap` when rank j holds expert a, which rank i holds too, in the place of b."""
    total = float(cut.shape[1])
    for s in range(cut.shape[1]):
        inside = cut[0, s]
        of_i = fixed[i, s]
        if holders[a] == 1:
            of_i -= tokens[a, s]
        if closed[s, j]:
            inside -= tokens[b, s] if outside[b, s] == 0 and holders[b] == 1 else 0.0
        else:
            inside -= tokens[a, s] if outside[a, s] == 0 else 0.0
            inside += tokens[b, s] if outside[b, s] == 1 else 0.0
        floors[s] = max(1.0, inside / cut[1, s], of_i)
        total += floors[s] - 1.0
        if total > limit:
            break
    return total


@compiled
def candidates(held, tokens, closed, load, kept, hot, node_ranks, copies, price, limit, moves, floors):
    """Moves that may lower the peaks where rank `hot` is among the busiest, the most promising first.

    Args:
        held: int64 (G, n).
        tokens: float64 (E, N), one row per expert.
        closed, load: of `evaluate` for `held`.
        kept: bool (G, E), experts that cost no copy on a rank.
        hot: the rank.
        node_ranks: experts stay in their node, so many ranks in a row.
        copies: copies that may be spent.
        price: what a copy must gain, in the sum of the peaks.
        limit: the sum of the peaks that a move has to get below.
        moves: int64 (M, 5), filled with rows (slot of `hot`, other rank, its slot, whether `hot` keeps its expert,
            copies): the two slots are exchanged, or the other rank's becomes a replica of `hot`'s.
        floors: float64 (M, N), filled with what each move leaves of the scenarios' peaks at least.

    Returns:
        The number of moves found.
    """
    width = held.shape[1]
    holders, outside, fixed, cut = _cut(held, tokens, closed, load)
    has = held_experts(held, holders.size)
    bounds = np.full(moves.shape[0], limit)
    here = np.empty(tokens.shape[1])
    node = hot // node_ranks * node_ranks
    found = 0
    for mine in range(width):
        a = held[hot, mine]
        for rank in range(node, node + node_ranks):
            if has[rank, a]:
                continue
            for theirs in range(width):
                b = held[rank, theirs]
                for keeps in range(2):
                    cost = np.int64(kept[rank, b]) - np.int64(kept[rank, a])
                    if keeps == 0:
                        cost += np.int64(kept[hot, a]) - np.int64(kept[hot, b])
                        if has[hot, b]:
                            continue
                    elif holders[b] == 1:
                        continue
                    if cost > copies:
                        continue
                    fee = price * max(cost, 0)
                    below = bounds[-1] - fee
                    if keeps == 0:
                        bound = _bound_of_swap(
                            a, b, hot, rank, tokens, closed, holders, outside, fixed, cut, below, here
                        )
                    else:
                        bound = _bound_of_change(
                            a, b, hot, rank, tokens, closed, holders, outside, fixed, cut, below, here
                        )
                    if bound >= below:
                        continue
                    place = min(found, moves.shape[0] - 1)
                    found = min(found + 1, moves.shape[0])
                    while place > 0 and bounds[place - 1] > bound + fee:
                        bounds[place] = bounds[place - 1]
                        moves[place] = moves[place - 1]
                        floors[place] = floors[place - 1]
                        place -= 1
                    bounds[place] = bound + fee
                    floors[place] = here
                    moves[place, 0] = mine
                    moves[place, 1] = rank
                    moves[place, 2] = theirs
                    moves[place, 3] = keeps
                    moves[place, 4] = cost
    return found
