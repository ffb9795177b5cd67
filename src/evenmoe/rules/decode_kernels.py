"""The compiled part of `split_batch` where weights count: few activated experts and few rows on the busiest rank.

What a rank costs is `weight_rows` for each expert that it has any row of, and one for each row. The least peak is hard
to find in general (on two ranks that hold everything it is the partition problem), so this is a search: from the exact
least number of activated experts, and from one of two other starts, rows go from the costliest rank to others as long
as that lowers the peak. All numbers are integers and every choice has a fixed order, so that every rank computes the
same; `reference/decode.py` takes the same steps in plain loops.

Holders and the graph are those of `split_kernels`.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled, compiled_inner
from evenmoe.rules.split_kernels import balance, first_wrong, sections_of

# Where rows are more than a quarter of what weights are worth, the split that leaves weights out is the second start:
# 256 experts on 288 slots of 32 ranks came out up to 11 % above that split from the other two starts alone.
MANY_ROWS = 4
# A move must leave the ranks that it touches more than a 1024th of the peak below it: thousands of rows are otherwise
# leveled in hundreds of moves for less than that.
LEAST_GAIN = 1024
_NONE = -1


@compiled_inner
def fill_single(num_tokens, weight_rows, sections, flow, cost):
    """Give experts on one rank alone their rows, and clear the other flows.

    Returns all rows, and what weights are worth if no expert is read twice.
    """
    first_holder, _, holder_rank, _, _, _, _, _, _ = sections
    for rank in range(cost.shape[0]):
        cost[rank] = 0
    rows = weights = 0
    for expert in range(num_tokens.shape[0]):
        tokens = num_tokens[expert]
        if tokens > 0:
            rows += tokens
            weights += weight_rows
        begin, end = first_holder[expert], first_holder[expert + 1]
        for holder in range(begin, end):
            flow[holder] = 0
        if tokens > 0 and end == begin + 1:
            flow[begin] = tokens
            cost[holder_rank[begin]] += tokens + weight_rows
    return rows, weights


@compiled_inner
def assign_one(num_tokens, sections, home, active, ranks, via, seen):
    """Give every expert that has rows one holder, so that the most experts that a rank activates are as few as can be.

    Experts with the fewest holders choose first, each the rank with the fewest so far. Then one expert after the other
    goes along a chain of ranks, from one with the most to one with two fewer. Once none is in reach, all ranks in reach
    of the most hold at most one expert fewer, and theirs can be held by no others: the peak is the least.

    Args:
        num_tokens: int64 (E,).
        sections: of the layer's graph.
        home: int64 (E,), filled with the holder of each expert, −1 without rows.
        active: int64 (G,), filled with the experts that each rank activates.
        ranks, via, seen: int64 (G,), (G,), (G,), overwritten.
    """
    first_holder, replicated, holder_rank, holder_expert, _, _, _, holders_at_rank, first_at_rank = sections
    num_ranks = active.shape[0]
    for rank in range(num_ranks):
        active[rank] = 0
    for expert in range(num_tokens.shape[0]):
        home[expert] = _NONE
        if num_tokens[expert] > 0 and first_holder[expert + 1] == first_holder[expert] + 1:
            home[expert] = first_holder[expert]
            active[holder_rank[home[expert]]] += 1
    for expert in replicated:
        if num_tokens[expert] > 0:
            best = first_holder[expert]
            for holder in range(best + 1, first_holder[expert + 1]):
                if active[holder_rank[holder]] < active[holder_rank[best]]:
                    best = holder
            home[expert] = best
            active[holder_rank[best]] += 1
    while True:
        top = 0
        for rank in range(num_ranks):
            seen[rank] = 0
            if active[rank] > active[top]:
                top = rank
        seen[top] = 1
        ranks[0] = top
        size, head, found = 1, 0, _NONE
        while head < size and found < 0:
            rank = ranks[head]
            head += 1
            for at in range(first_at_rank[rank], first_at_rank[rank + 1]):
                expert = holder_expert[holders_at_rank[at]]
                if home[expert] != holders_at_rank[at]:
                    continue
                for holder in range(first_holder[expert], first_holder[expert + 1]):
                    other = holder_rank[holder]
                    if seen[other] == 0:
                        seen[other] = 1
                        via[other] = holder
                        ranks[size] = other
                        size += 1
                        if active[other] + 2 <= active[top]:
                            found = other
                            break
                if found >= 0:
                    break
        if found < 0:
            return
        active[found] += 1
        active[top] -= 1
        rank = found
        while rank != top:
            expert = holder_expert[via[rank]]
            before = holder_rank[home[expert]]
            home[expert] = via[rank]
            rank = before


@compiled_inner
def lower_peak(weight_rows, sections, flow, cost, floor):
    """Move rows off the costliest rank until that finds no lower peak, or it is `floor`; returns the peak.

    Of one expert on the costliest rank either all rows go to another holder, or so many that both ranks cost the same,
    or all go while another expert goes on from there to a third rank. The move that leaves the least peak among the
    ranks that it touches is made, the first of equals, if that is a thousandth below the peak. It ends, as each leaves
    fewer ranks that cost as much.
    """
    first_holder, _, holder_rank, holder_expert, _, _, _, holders_at_rank, first_at_rank = sections
    while True:
        top = 0
        for rank in range(1, cost.shape[0]):
            if cost[rank] > cost[top]:
                top = rank
        peak = cost[top]
        if peak <= floor:
            return peak
        best, give, take, rows, out, into = peak - peak // LEAST_GAIN, _NONE, _NONE, 0, _NONE, _NONE
        for at in range(first_at_rank[top], first_at_rank[top + 1]):
            mine = holders_at_rank[at]
            all_rows = flow[mine]
            if all_rows == 0:
                continue
            expert = holder_expert[mine]
            without = peak - all_rows - weight_rows
            for holder in range(first_holder[expert], first_holder[expert + 1]):
                if holder == mine:
                    continue
                rank = holder_rank[holder]
                weights = weight_rows if flow[holder] == 0 else 0
                with_all = cost[rank] + all_rows + weights
                highest = max(without, with_all)
                if highest < best:
                    best, give, take, rows, out, into = highest, mine, holder, all_rows, _NONE, _NONE
                part = (peak - cost[rank] - weights) // 2
                if 0 < part < all_rows and peak - part < best:
                    best, give, take, rows, out, into = peak - part, mine, holder, part, _NONE, _NONE
                if without >= best:
                    continue
                for where in range(first_at_rank[rank], first_at_rank[rank + 1]):
                    theirs = holders_at_rank[where]
                    gone = flow[theirs]
                    if gone == 0 or theirs == holder:
                        continue
                    left = with_all - gone - weight_rows
                    if left >= best:
                        continue
                    other = holder_expert[theirs]
                    for third in range(first_holder[other], first_holder[other + 1]):
                        if third == theirs:
                            continue
                        last = holder_rank[third]
                        more = gone + (weight_rows if flow[third] == 0 else 0)
                        highest = max(left, without + more if last == top else max(without, cost[last] + more))
                        if highest < best:
                            best, give, take, rows, out, into = highest, mine, holder, all_rows, theirs, third
        if give < 0:
            return peak
        _move(give, take, rows, weight_rows, holder_rank, flow, cost)
        if out >= 0:
            _move(out, into, flow[out], weight_rows, holder_rank, flow, cost)


@compiled_inner
def _move(give, take, rows, weight_rows, holder_rank, flow, cost):
    """Move rows of one expert from a holder to another."""
    if flow[take] == 0:
        cost[holder_rank[take]] += weight_rows
    flow[give] -= rows
    flow[take] += rows
    cost[holder_rank[give]] -= rows
    cost[holder_rank[take]] += rows
    if flow[give] == 0:
        cost[holder_rank[give]] -= weight_rows


@compiled_inner
def start_by_size(num_tokens, weight_rows, sections, order, flow, cost):
    """Give each expert with a choice, most rows first, to the holder whose rank costs least so far."""
    first_holder, replicated, holder_rank, _, _, _, _, _, _ = sections
    size = 0
    for expert in replicated:
        if num_tokens[expert] > 0:
            at = size
            while at > 0 and num_tokens[order[at - 1]] < num_tokens[expert]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = expert
            size += 1
    for i in range(size):
        expert = order[i]
        best = first_holder[expert]
        for holder in range(best + 1, first_holder[expert + 1]):
            if cost[holder_rank[holder]] < cost[holder_rank[best]]:
                best = holder
        flow[best] = num_tokens[expert]
        cost[holder_rank[best]] += num_tokens[expert] + weight_rows


@compiled
def start_even(num_tokens, weight_rows, sections, flow, cost):
    """Split as if weights cost nothing."""
    _, _, holder_rank, _, _, _, _, _, _ = sections
    for holder in range(flow.shape[0]):
        flow[holder] = 0
    for rank in range(cost.shape[0]):
        cost[rank] = 0
    balance(num_tokens, sections, flow, cost)
    for holder in range(flow.shape[0]):
        if flow[holder] > 0:
            cost[holder_rank[holder]] += weight_rows


@compiled
def split_decode(num_tokens, graphs, num_ranks, weight_rows, per_slot):
    """As `split_kernels.split_layers`, each expert's weights on a rank costing as much as `weight_rows` rows.

    An expert's rows on a rank go to the first of its slots there, since a second one would read the same weights again.
    """
    num_layers, num_experts = num_tokens.shape
    num_slots = per_slot.shape[1]
    flow, second = np.empty(num_slots, np.int64), np.empty(num_slots, np.int64)
    cost, second_cost = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    home, order = np.empty(num_experts, np.int64), np.empty(num_experts, np.int64)
    active, ranks = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    via, seen = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    for layer in range(num_layers):
        sections = sections_of(graphs[layer], num_experts, num_slots, num_ranks)
        first_holder, replicated, holder_rank, _, _, slot_holder, slot_number, _, _ = sections
        tokens = num_tokens[layer]
        wrong = first_wrong(tokens, first_holder)
        if wrong >= 0:
            return layer * num_experts + wrong
        rows, weights = fill_single(tokens, weight_rows, sections, flow, cost)
        floor = (rows + weights + num_ranks - 1) // num_ranks
        for rank in range(num_ranks):
            floor = max(floor, cost[rank])
            second_cost[rank] = cost[rank]
        for holder in range(first_holder[num_experts]):
            second[holder] = flow[holder]
        assign_one(tokens, sections, home, active, ranks, via, seen)
        for expert in replicated:
            if home[expert] >= 0:
                flow[home[expert]] = tokens[expert]
                cost[holder_rank[home[expert]]] += tokens[expert] + weight_rows
        taken = flow
        peak = lower_peak(weight_rows, sections, flow, cost, floor)
        if peak > floor:
            if MANY_ROWS * rows > weights:
                start_even(tokens, weight_rows, sections, second, second_cost)
            else:
                start_by_size(tokens, weight_rows, sections, order, second, second_cost)
            if lower_peak(weight_rows, sections, second, second_cost, floor) < peak:
                taken = second
        for slot in range(num_slots):
            per_slot[layer, slot] = taken[slot_holder[slot]] if slot_number[slot] == 0 else 0
    return -1
