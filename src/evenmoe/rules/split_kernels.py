"""The compiled part of `split_batch`: the graph of a placement, and the exact split of one batch on it.

A *holder* is a rank that holds at least one replica of an expert; the tokens of an expert flow to its holders. All
flows are integers from beginning to end, so nothing has to be rounded afterwards and every rank computes the same
split.

The rank loads that flows can reach form an M-convex set. Of such a set an element is lexicographically min-max exactly
if no single token can go, along a chain of holders, from a rank to one that holds at least two tokens fewer (Frank and
Murota, "Decreasing minimization on M-convex sets: background and structures", Mathematical Programming 195, 2022: no
1-tightening step). `_improve` looks for such chains until there is none, which is the proof of optimality, whatever
went before. Sweeps of water-filling and leveling along a tree only leave it little to do: by sweeps alone a chain of
G ranks takes about G² of them.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled, compiled_inner

# Sweeps before the first leveling, and passes of chains before the next one: on zipf(1.0) loads with drift 0.3 and
# 0.6, 256 experts in 264 to 320 slots on 8 and 32 ranks, 2…5 and 1…8 all take 5…20 µs a layer.
_FIRST_SWEEPS = 3
_CHAIN_PASSES = 4
# Leveling may overshoot where an expert runs out of tokens, so after this many rounds only chains are used, each of
# which makes the split strictly better. 384 ranks in a chain, or with 1200 replicas at random, needed 9 rounds at most.
_LEVELING_ROUNDS = 16


@compiled
def graph_size(num_experts, num_slots, num_ranks):
    """Entries of one layer's graph: two lengths, then the sections that `sections_of` cuts out."""
    return 2 + 2 * (num_experts + 1) + 6 * num_slots + (num_ranks + 1)


@compiled
def sections_of(graph, num_experts, num_slots, num_ranks):
    """Views of a graph, which is one array because a call pays for every array that crosses into compiled code.

    Returns:
        first_holder: (E + 1,), the holders of expert e are first_holder[e] … first_holder[e + 1] − 1.
        replicated: (R,), experts with two or more holders, those with the fewest holders first.
        holder_rank: (S,), the rank of each holder; S is the most holders there can be.
        holder_expert: (S,), the expert of each holder.
        holder_slots: (S,), the number of slots of each holder.
        slot_holder: (S,), the holder that each slot belongs to.
        slot_number: (S,), position of the slot among the slots of its holder.
        holders_at_rank: the holders of replicated experts, rank by rank, and
        first_at_rank: (G + 1,), where each rank's begin.
    """
    at = 2
    first_holder = graph[at : at + num_experts + 1]
    at += num_experts + 1
    replicated = graph[at : at + graph[0]]
    at += num_experts + 1
    holder_rank = graph[at : at + num_slots]
    at += num_slots
    holder_expert = graph[at : at + num_slots]
    at += num_slots
    holder_slots = graph[at : at + num_slots]
    at += num_slots
    slot_holder = graph[at : at + num_slots]
    at += num_slots
    slot_number = graph[at : at + num_slots]
    at += num_slots
    holders_at_rank = graph[at : at + graph[1]]
    at += num_slots
    first_at_rank = graph[at : at + num_ranks + 1]
    return (
        first_holder,
        replicated,
        holder_rank,
        holder_expert,
        holder_slots,
        slot_holder,
        slot_number,
        holders_at_rank,
        first_at_rank,
    )


@compiled
def graphs_of(slot_to_expert, slot_to_rank, num_ranks, num_experts):
    """Graphs of all layers: slot_to_expert int64 (L, S) -> int64 (L, graph_size); no layer if an id is out of range.

    `slot_to_rank` int64 (S,) ascends.
    """
    num_layers, num_slots = slot_to_expert.shape
    for layer in range(num_layers):
        for slot in range(num_slots):
            if slot_to_expert[layer, slot] < 0 or slot_to_expert[layer, slot] >= num_experts:
                return np.zeros((0, 0), np.int64)
    graphs = np.zeros((num_layers, graph_size(num_experts, num_slots, num_ranks)), np.int64)
    for layer in range(num_layers):
        _find_holders(slot_to_expert[layer], slot_to_rank, num_ranks, num_experts, graphs[layer])
        _find_replicated(graphs[layer], num_ranks, num_experts, num_slots)
    return graphs


@compiled
def _find_holders(slot_to_expert, slot_to_rank, num_ranks, num_experts, graph):
    num_slots = slot_to_expert.shape[0]
    first_holder, _, holder_rank, holder_expert, holder_slots, slot_holder, slot_number, _, _ = sections_of(
        graph, num_experts, num_slots, num_ranks
    )
    last_rank = np.full(num_experts, -1, np.int64)
    for slot in range(num_slots):
        expert = slot_to_expert[slot]
        if last_rank[expert] != slot_to_rank[slot]:
            last_rank[expert] = slot_to_rank[slot]
            first_holder[expert + 1] += 1
    for expert in range(num_experts):
        first_holder[expert + 1] += first_holder[expert]
    end = first_holder[:-1].copy()
    for slot in range(num_slots):
        expert = slot_to_expert[slot]
        rank = slot_to_rank[slot]
        holder = end[expert] - 1
        if holder < first_holder[expert] or holder_rank[holder] != rank:
            holder += 1
            end[expert] += 1
            holder_rank[holder] = rank
            holder_expert[holder] = expert
        slot_holder[slot] = holder
        slot_number[slot] = holder_slots[holder]
        holder_slots[holder] += 1


@compiled
def _find_replicated(graph, num_ranks, num_experts, num_slots):
    """Experts with a choice, fewest holders first (the flexible ones then fill the gaps), and their holders by rank."""
    first_holder, _, holder_rank, _, _, _, _, _, first_at_rank = sections_of(graph, num_experts, num_slots, num_ranks)
    with_holders = np.zeros(num_ranks + 2, np.int64)
    for expert in range(num_experts):
        holders = first_holder[expert + 1] - first_holder[expert]
        if holders > 1:
            with_holders[holders + 1] += 1
            for holder in range(first_holder[expert], first_holder[expert + 1]):
                first_at_rank[holder_rank[holder] + 1] += 1
    for holders in range(num_ranks + 1):
        with_holders[holders + 1] += with_holders[holders]
    for rank in range(num_ranks):
        first_at_rank[rank + 1] += first_at_rank[rank]
    graph[0] = with_holders[num_ranks + 1]
    graph[1] = first_at_rank[num_ranks]
    _, replicated, _, _, _, _, _, holders_at_rank, _ = sections_of(graph, num_experts, num_slots, num_ranks)
    end = first_at_rank[:-1].copy()
    for expert in range(num_experts):
        holders = first_holder[expert + 1] - first_holder[expert]
        if holders > 1:
            replicated[with_holders[holders]] = expert
            with_holders[holders] += 1
            for holder in range(first_holder[expert], first_holder[expert + 1]):
                holders_at_rank[end[holder_rank[holder]]] = holder
                end[holder_rank[holder]] += 1


@compiled
def _water_fill(tokens, begin, end, holder_rank, flow, load):
    """Take one expert's tokens away and give them back to its holders up to a common water level."""
    count = end - begin
    total = tokens
    for holder in range(begin, end):
        total += load[holder_rank[holder]]
        total -= flow[holder]
    level = total // count
    while True:
        kept = 0
        total = tokens
        for holder in range(begin, end):
            without = load[holder_rank[holder]] - flow[holder]
            if without <= level:
                kept += 1
                total += without
        if kept == count:
            break
        count = kept
        level = total // count
    extra = total - level * count
    for holder in range(begin, end):
        rank = holder_rank[holder]
        without = load[rank] - flow[holder]
        share = 0
        if without <= level:
            share = level - without
            if extra > 0:
                share += 1
                extra -= 1
        flow[holder] = share
        load[rank] = without + share


@compiled
def _sweep(num_tokens, first_holder, holder_rank, replicated, flow, load):
    for expert in replicated:
        if num_tokens[expert] > 0:
            _water_fill(num_tokens[expert], first_holder[expert], first_holder[expert + 1], holder_rank, flow, load)


@compiled
def _level(first_holder, holder_rank, holder_expert, holders_at_rank, first_at_rank, flow, load):
    """Bring every set of ranks that share experts with tokens to one level, along a tree of such experts.

    Where an expert has too few tokens to move, all it has are moved and the set is cut there.
    """
    num_ranks = load.shape[0]
    order = np.empty(num_ranks, np.int64)
    give_holder = np.empty(
        num_ranks, np.int64
    )  # holder on the rank itself, and on its parent, of the expert between them
    take_holder = np.empty(num_ranks, np.int64)
    seen_rank = np.zeros(num_ranks, np.bool_)
    seen_expert = np.zeros(first_holder.shape[0] - 1, np.bool_)
    for root in range(num_ranks):
        if seen_rank[root]:
            continue
        seen_rank[root] = True
        order[0] = root
        size = 1
        head = 0
        total = load[root]
        while head < size:
            rank = order[head]
            head += 1
            for at in range(first_at_rank[rank], first_at_rank[rank + 1]):
                mine = holders_at_rank[at]
                expert = holder_expert[mine]
                if flow[mine] == 0 or seen_expert[expert]:
                    continue
                seen_expert[expert] = True
                for holder in range(first_holder[expert], first_holder[expert + 1]):
                    other = holder_rank[holder]
                    if flow[holder] > 0 and not seen_rank[other]:
                        seen_rank[other] = True
                        give_holder[other] = holder
                        take_holder[other] = mine
                        order[size] = other
                        size += 1
                        total += load[other]
        level = total // size
        extra = total - level * size
        for i in range(size - 1, 0, -1):
            rank = order[i]
            goal = level
            if load[rank] > level and extra > 0:
                goal += 1
                extra -= 1
            give = give_holder[rank]
            take = take_holder[rank]
            amount = min(max(load[rank] - goal, -flow[take]), flow[give])
            flow[give] -= amount
            flow[take] += amount
            load[rank] -= amount
            load[holder_rank[take]] += amount


@compiled
def _improve(first_holder, holder_rank, holder_expert, holders_at_rank, first_at_rank, flow, load):
    """Move tokens along chains of holders from a rank to one with at least two tokens fewer; returns how many chains.

    From the emptiest rank upwards, find every rank that can reach it, and no emptier one. The experts that lead to two
    different low ranks are different ones, so a chain to each can be used in one pass. No chain: the split is optimal.
    """
    num_ranks = load.shape[0]
    queue = np.empty(num_ranks, np.int64)
    from_holder = np.empty(num_ranks, np.int64)
    to_holder = np.empty(num_ranks, np.int64)
    seen_rank = np.zeros(num_ranks, np.bool_)
    seen_expert = np.zeros(first_holder.shape[0] - 1, np.bool_)
    chains = 0
    while True:
        low = -1
        for rank in range(num_ranks):
            if not seen_rank[rank] and (low < 0 or load[rank] < load[low]):
                low = rank
        if low < 0:
            return chains
        seen_rank[low] = True
        queue[0] = low
        size = 1
        head = 0
        high = low
        while head < size:
            rank = queue[head]
            head += 1
            for at in range(first_at_rank[rank], first_at_rank[rank + 1]):
                mine = holders_at_rank[at]
                expert = holder_expert[mine]
                if seen_expert[expert]:
                    continue
                seen_expert[expert] = True
                for holder in range(first_holder[expert], first_holder[expert + 1]):
                    other = holder_rank[holder]
                    if flow[holder] == 0 or seen_rank[other]:
                        continue
                    seen_rank[other] = True
                    from_holder[other] = holder
                    to_holder[other] = mine
                    queue[size] = other
                    size += 1
                    if load[other] > load[high]:
                        high = other
        if load[high] >= load[low] + 2:
            chains += 1
            amount = (load[high] - load[low]) // 2
            step = high
            while step != low:
                amount = min(amount, flow[from_holder[step]])
                step = holder_rank[to_holder[step]]
            load[high] -= amount
            load[low] += amount
            step = high
            while step != low:
                flow[from_holder[step]] -= amount
                flow[to_holder[step]] += amount
                step = holder_rank[to_holder[step]]


@compiled
def balance(num_tokens, sections, flow, load):
    """Flows of one batch that make the rank loads lexicographically min-max. `flow` and `load` come in as zeros."""
    first_holder, replicated, holder_rank, holder_expert, _, _, _, holders_at_rank, first_at_rank = sections
    for expert in range(num_tokens.shape[0]):
        holder = first_holder[expert]
        if first_holder[expert + 1] == holder + 1:
            flow[holder] = num_tokens[expert]
            load[holder_rank[holder]] += num_tokens[expert]
    for _ in range(_FIRST_SWEEPS - 1):
        _sweep(num_tokens, first_holder, holder_rank, replicated, flow, load)
    rounds = 0
    while True:
        if rounds < _LEVELING_ROUNDS:
            _sweep(num_tokens, first_holder, holder_rank, replicated, flow, load)
            _level(first_holder, holder_rank, holder_expert, holders_at_rank, first_at_rank, flow, load)
        rounds += 1
        for _ in range(_CHAIN_PASSES):
            if _improve(first_holder, holder_rank, holder_expert, holders_at_rank, first_at_rank, flow, load) == 0:
                return


@compiled_inner
def first_wrong(tokens, first_holder):
    """The first expert of a layer that has a negative number of tokens, or tokens but no slot; −1 if there is none."""
    for expert in range(tokens.size):
        if tokens[expert] < 0 or (tokens[expert] > 0 and first_holder[expert] == first_holder[expert + 1]):
            return expert
    return -1


@compiled
def split_layers(num_tokens, graphs, num_ranks, per_slot):
    """The best split of every layer: num_tokens int64 (L, E), graphs of `graphs_of` -> fills per_slot int64 (L, S).

    Returns −1, or the flat index (layer · E + expert) of the first entry that is negative or has tokens but no slot.
    """
    num_layers, num_experts = num_tokens.shape
    num_slots = per_slot.shape[1]
    flow = np.empty(num_slots, np.int64)
    load = np.empty(num_ranks, np.int64)
    for layer in range(num_layers):
        sections = sections_of(graphs[layer], num_experts, num_slots, num_ranks)
        first_holder, _, _, _, holder_slots, slot_holder, slot_number, _, _ = sections
        tokens = num_tokens[layer]
        wrong = first_wrong(tokens, first_holder)
        if wrong >= 0:
            return layer * num_experts + wrong
        flow[:] = 0
        load[:] = 0
        balance(tokens, sections, flow, load)
        for slot in range(num_slots):
            holder = slot_holder[slot]
            count = holder_slots[holder]
            per_slot[layer, slot] = (
                flow[holder] if count == 1 else (flow[holder] + count - 1 - slot_number[slot]) // count
            )
    return -1
