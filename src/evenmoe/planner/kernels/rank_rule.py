"""The compiled part of planning for the `rank` rule: replicas with unequal shares, packed and exchanged.

The tokens come from a world of W ranks; the slots are on all of them, or on those of one node. Replica k of `count`
gets the tokens of the ranks from k · ceil(W / count) on, so all replicas get ceil(W / count) ranks but the last
reachable one, which may get fewer, and those behind it, which get none (specification §1.4). Loads are in mean rank
loads: 1.0 is the peak nothing can beat.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled
from evenmoe.planner.kernels.packing import held_experts, lightest

# The weight of the squared rank loads beside the peaks: enough to leave a tie of several busiest ranks.
_SQUARES = 0.01
# What a move must gain, in mean rank loads per window, and moves at most.
_GAIN = 5e-5
_MOVES = 300
NO_MOVE = 99


@compiled
def share_of(count, replica, world):
    """The share of its expert's tokens that a replica gets."""
    width = -(-world // count)
    return min(max(world - width * replica, 0), width) / world


@compiled
def _next_count(count, world):
    """The fewest replicas whose largest share is below that of `count`; `count` itself where there are none."""
    width = -(-world // count)
    return -(-world // (width - 1)) if width > 1 else count


@compiled
def wasted(counts, most, world):
    """Replicas that no rank can choose, and the fewest more that would lower some expert's shares (a large number
    where nobody may have so many: `most` per expert)."""
    idle, step = 0, np.int64(2**62)
    for expert in range(counts.size):
        width = -(-world // counts[expert])
        chosen = -(-world // width)
        idle += counts[expert] - chosen
        following = _next_count(chosen, world)
        if chosen < following <= most:
            step = min(step, following - chosen)
    return idle, step


@compiled
def count_reachable(weight, num_slots, most, world):
    """Replicas int64 (E,), at most `most`, that the rule reaches all of, so that the largest load of one is least.

    From the largest load per replica down, each expert goes on to the next count that lowers its own, if the slots
    left suffice. Slots that suffice for nobody (8 ranks, 4 replicas: the next count is 8) become replicas that no
    rank chooses, of the lightest expert that stays as it is with one more.
    """
    counts = np.ones(weight.size, np.int64)
    left = num_slots - weight.size
    while left > 0:
        best = -1
        heaviest = -1.0
        for expert in range(weight.size):
            width = -(-world // counts[expert])
            following = _next_count(counts[expert], world)
            if counts[expert] < following <= min(most, counts[expert] + left) and weight[expert] * width > heaviest:
                best = expert
                heaviest = weight[expert] * width
        if best < 0:
            break
        following = _next_count(counts[best], world)
        left -= following - counts[best]
        counts[best] = following
    while left > 0:
        best = -1
        for expert in range(weight.size):
            if counts[expert] < most and (best < 0 or weight[expert] < weight[best]):
                best = expert
        counts[best] += 1
        left -= 1
    return counts


@compiled
def pack(weight, counts, held, index, world):
    """Fill `held` and `index` (G, n), the expert and its replica number in each slot: heaviest first, lightest rank."""
    num_ranks, width = held.shape
    pieces = np.empty((held.size, 2), np.int64)
    heavy = np.empty(held.size)
    at = 0
    for expert in range(weight.size):
        for replica in range(counts[expert]):
            pieces[at, 0] = expert
            pieces[at, 1] = replica
            heavy[at] = weight[expert] * share_of(counts[expert], replica, world)
            at += 1
    used = np.zeros(num_ranks, np.int64)
    load = np.zeros(num_ranks)
    has = np.zeros((num_ranks, weight.size), np.bool_)
    for piece in np.argsort(-heavy, kind="mergesort"):
        expert = pieces[piece, 0]
        best = lightest(load, used, width, has[:, expert])
        if best < 0:
            best = _make_room(expert, held, index, used, has)
            for rank in range(num_ranks):
                load[rank] = 0.0
                for slot in range(used[rank]):
                    other = held[rank, slot]
                    load[rank] += weight[other] * share_of(counts[other], index[rank, slot], world)
        held[best, used[best]] = expert
        index[best, used[best]] = pieces[piece, 1]
        used[best] += 1
        has[best, expert] = True
        load[best] += heavy[piece]


@compiled
def _make_room(expert, held, index, used, has):
    """Every rank with a free slot holds `expert`: move something there from a full rank, and return that rank.

    One always exists: a full rank without `expert` holds n experts, the rank with the free slot fewer.
    """
    num_ranks, width = held.shape
    free = 0
    while used[free] == width:
        free += 1
    for rank in range(num_ranks):
        if has[rank, expert]:
            continue
        for slot in range(width):
            moved = held[rank, slot]
            if not has[free, moved]:
                held[free, used[free]] = moved
                index[free, used[free]] = index[rank, slot]
                used[free] += 1
                used[rank] -= 1
                held[rank, slot] = held[rank, used[rank]]
                index[rank, slot] = index[rank, used[rank]]
                has[free, moved] = True
                has[rank, moved] = False
                return rank
    return -1


@compiled
def loads_and_goal(held, index, counts, tokens, loads, world):
    """Fill `loads` (T, G) for `tokens` (T, E); returns the goal: peaks, and a little of the squares."""
    num_ranks, width = held.shape
    loads[:] = 0.0
    goal = 0.0
    for rank in range(num_ranks):
        for slot in range(width):
            expert = held[rank, slot]
            share = share_of(counts[expert], index[rank, slot], world)
            for window in range(tokens.shape[0]):
                loads[window, rank] += share * tokens[window, expert]
    for window in range(tokens.shape[0]):
        goal += loads[window].max() + _SQUARES * (loads[window] ** 2).mean()
    return goal


@compiled
def _change_of_exchange(i, j, out, into, out_share, into_share, tokens, loads, others):
    """How much the goal changes when rank i gives a replica of `out` to rank j for one of `into`."""
    change = 0.0
    for window in range(tokens.shape[0]):
        moved = out_share * tokens[window, out] - into_share * tokens[window, into]
        rest = others[window, 0]
        if others[window, 1] == i or others[window, 1] == j:
            rest = others[window, 2]
            if others[window, 3] == i or others[window, 3] == j:
                rest = others[window, 4]
        of_i, of_j = loads[window, i], loads[window, j]
        change += max(rest, of_i - moved, of_j + moved) - others[window, 0]
        change += _SQUARES * 2 * moved * (moved - of_i + of_j) / loads.shape[1]
    return change


@compiled
def _busiest_three(loads, others):
    """Fill `others` (T, 5): the largest rank load and its rank, the second and its rank, the third load."""
    for window in range(loads.shape[0]):
        others[window] = (-1.0, -1.0, -1.0, -1.0, -1.0)
        for rank in range(loads.shape[1]):
            here = loads[window, rank]
            if here > others[window, 0]:
                others[window, 4] = others[window, 2]
                others[window, 2], others[window, 3] = others[window, 0], others[window, 1]
                others[window, 0], others[window, 1] = here, rank
            elif here > others[window, 2]:
                others[window, 4] = others[window, 2]
                others[window, 2], others[window, 3] = here, rank
            elif here > others[window, 4]:
                others[window, 4] = here


@compiled
def _add_replica(held, index, counts, a, rank, slot):
    """Replace what a slot holds by one more replica of expert `a`; the other replicas close up."""
    b, gone = held[rank, slot], index[rank, slot]
    held[rank, slot], index[rank, slot] = a, counts[a]
    counts[a] += 1
    counts[b] -= 1
    for other in range(held.shape[0]):
        for place in range(held.shape[1]):
            if held[other, place] == b and index[other, place] > gone:
                index[other, place] -= 1


@compiled
def _best_exchange(hot, held, index, counts, tokens, loads, has, kept, copies, price, world, node_ranks):
    """The best exchange of a slot of `hot`: (change of the goal and price, slot, rank, slot, copies)."""
    width = held.shape[1]
    node = hot // node_ranks * node_ranks
    others = np.empty((tokens.shape[0], 5))
    _busiest_three(loads, others)
    best = (0.0, -1, -1, -1, 0)
    for mine in range(width):
        a = held[hot, mine]
        a_share = share_of(counts[a], index[hot, mine], world)
        for rank in range(node, node + node_ranks):
            for theirs in range(width):
                b = held[rank, theirs]
                if rank == hot or (a != b and (has[rank, a] or has[hot, b])):
                    continue
                cost = 0
                if a != b:
                    cost = np.int64(kept[hot, a]) + kept[rank, b] - np.int64(kept[hot, b]) - kept[rank, a]
                if cost > copies:
                    continue
                b_share = share_of(counts[b], index[rank, theirs], world)
                change = _change_of_exchange(hot, rank, a, b, a_share, b_share, tokens, loads, others)
                if change + price * max(cost, 0) < best[0]:
                    best = (change + price * max(cost, 0), mine, rank, theirs, cost)
    return best


@compiled
def _goal_with_replica(a, b, rank, replica_at, counts, tokens, loads, world):
    """The goal if `rank` held one more replica of `a` in the place of its replica of `b`."""
    num_windows, num_ranks = loads.shape
    more = np.zeros(num_ranks)
    less = np.zeros(num_ranks)
    gone = replica_at[rank, b]
    for other in range(num_ranks):
        replica = replica_at[other, a]
        if replica >= 0:
            more[other] = share_of(counts[a] + 1, replica, world) - share_of(counts[a], replica, world)
        replica = replica_at[other, b]
        if replica >= 0:
            less[other] = -share_of(counts[b], replica, world)
            if other != rank:
                less[other] += share_of(counts[b] - 1, replica - (replica > gone), world)
    more[rank] = share_of(counts[a] + 1, counts[a], world)
    goal = 0.0
    for window in range(num_windows):
        peak = 0.0
        squares = 0.0
        for other in range(num_ranks):
            here = loads[window, other] + more[other] * tokens[window, a] + less[other] * tokens[window, b]
            peak = max(peak, here)
            squares += here * here
        goal += peak + _SQUARES * squares / num_ranks
    return goal


@compiled
def _wastes(a, b, counts, most, world, idle):
    """Whether one replica of `b` less and of `a` more leaves more idle than `idle`, and somebody had use for them."""
    counts[a] += 1
    counts[b] -= 1
    now, step = wasted(counts, most, world)
    counts[a] -= 1
    counts[b] += 1
    return now > idle and now >= step


@compiled
def _best_replica(hot, held, index, counts, tokens, loads, goal, kept, copies, price, world, node_ranks):
    """The best new replica of an expert of `hot`: (change of the goal and price, slot, rank, slot, copies)."""
    num_ranks, width = held.shape
    node = hot // node_ranks * node_ranks
    replica_at = np.full((num_ranks, counts.size), -1, np.int64)
    doubled = np.zeros(counts.size, np.bool_)  # twice on a rank, as a placement in use may be; they can be exchanged
    for rank in range(num_ranks):
        for slot in range(width):
            expert = held[rank, slot]
            doubled[expert] |= replica_at[rank, expert] >= 0
            replica_at[rank, expert] = index[rank, slot]
    idle, _ = wasted(counts, node_ranks, world)
    best = (0.0, -1, -1, -1, 0)
    for mine in range(width):
        a = held[hot, mine]
        if counts[a] >= node_ranks or _next_count(counts[a], world) != counts[a] + 1:
            continue  # one more would not lower any replica's share
        for rank in range(node, node + node_ranks):
            for theirs in range(width):
                b = held[rank, theirs]
                cost = np.int64(kept[rank, b]) - np.int64(kept[rank, a])
                if replica_at[rank, a] >= 0 or counts[b] == 1 or cost > copies or doubled[a] or doubled[b]:
                    continue
                change = _goal_with_replica(a, b, rank, replica_at, counts, tokens, loads, world) - goal
                if change + price * max(cost, 0) < best[0] and not _wastes(a, b, counts, node_ranks, world, idle):
                    best = (change + price * max(cost, 0), mine, rank, theirs, cost)
    return best


@compiled
def _step(held, index, counts, tokens, loads, has, kept, copies, price, world, node_ranks):
    """Make the best move of a busiest rank, in place, for at most `copies` more; returns its copies, or 99 for none."""
    num_windows, num_ranks = loads.shape
    goal = loads_and_goal(held, index, counts, tokens, loads, world)
    over = np.zeros(num_ranks)
    for window in range(num_windows):
        peak = loads[window].max()
        for rank in range(num_ranks):
            if loads[window, rank] > peak - 1e-9:
                over[rank] += loads[window, rank] - 1.0
    fee = price * num_windows
    while over.max() > 5e-4:
        hot = np.argmax(over)
        over[hot] = 0.0
        swap = _best_exchange(hot, held, index, counts, tokens, loads, has, kept, copies, fee, world, node_ranks)
        exchange = swap[0] < -_GAIN * num_windows
        if not exchange:  # only then, since a new replica takes longer to judge
            swap = _best_replica(hot, held, index, counts, tokens, loads, goal, kept, copies, fee, world, node_ranks)
        change, mine, rank, theirs, cost = swap
        if change > -_GAIN * num_windows:
            continue
        a, b = held[hot, mine], held[rank, theirs]
        if exchange:
            held[hot, mine], held[rank, theirs] = b, a
            index[hot, mine], index[rank, theirs] = index[rank, theirs], index[hot, mine]
        else:
            _add_replica(held, index, counts, a, rank, theirs)
        for changed in (hot, rank):
            has[changed, a] = (held[changed] == a).any()
            has[changed, b] = (held[changed] == b).any()
        return cost
    return NO_MOVE


@compiled
def improve(held, index, counts, tokens, kept, copies, price, world, node_ranks):
    """Exchange slots and make replicas, in place, until no move of a busiest rank pays; returns the mean peak.

    The budget opens by one copy at a time and then the next moves are those within it, so the plan of a smaller
    budget is a stop on the way of every larger one. The best stop is kept: more copies are never worse.

    Args:
        held, index: int64 (G, n). counts: int64 (E,). tokens: float64 (T, E), mean rank load 1 in every window.
        kept: bool (G, E), experts that cost no copy on a rank.
        copies: copies that may be spent. price: what a copy must gain, in mean rank loads per window.
        world: ranks that the tokens come from. node_ranks: experts stay in their node, so many ranks in a row.
    """
    num_windows = tokens.shape[0]
    loads = np.empty((num_windows, held.shape[0]))
    has = held_experts(held, counts.size)
    loads_and_goal(held, index, counts, tokens, loads, world)
    best, best_held, best_index, best_counts = _mean_peak(loads), held.copy(), index.copy(), counts.copy()
    opened = spent = 0
    for _ in range(_MOVES):
        cost = _step(held, index, counts, tokens, loads, has, kept, opened - spent, price, world, node_ranks)
        while cost == NO_MOVE and opened < min(copies, spent + 2):  # no move costs more than two
            opened += 1
            cost = _step(held, index, counts, tokens, loads, has, kept, opened - spent, price, world, node_ranks)
        if cost == NO_MOVE:
            break
        spent += cost
        loads_and_goal(held, index, counts, tokens, loads, world)
        if _mean_peak(loads) < best:
            best = _mean_peak(loads)
            best_held[:], best_index[:], best_counts[:] = held, index, counts
    held[:], index[:], counts[:] = best_held, best_index, best_counts
    return best


@compiled
def _mean_peak(loads):
    """The mean over the windows of the largest rank load."""
    total = 0.0
    for window in range(loads.shape[0]):
        total += loads[window].max()
    return total / loads.shape[0]
