"""The compiled part of `split_batch`: the graph of a placement, and the exact split of one batch on it.

A *host* is a rank that holds at least one replica of an expert; the tokens of an expert flow to its hosts. All flows
are integers from beginning to end, so nothing has to be rounded afterwards and every rank computes the same split.

The rank loads that flows can reach form an M-convex set. Of such a set an element is lexicographically min-max exactly
if no single token can go, along a chain of hosts, from a rank to one that holds at least two tokens fewer (Frank and
Murota, "Decreasing minimization on M-convex sets: background and structures", Mathematical Programming 195, 2022: no
1-tightening step). `_improve` looks for such chains until there is none, which is the proof of optimality, whatever
went before. Sweeps of water-filling and levelling along a tree only leave it little to do: by sweeps alone a chain of
G ranks takes about G² of them.
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled

# Sweeps before the first levelling, and passes of chains before the next one: on zipf(1.0) loads with drift 0.3 and
# 0.6, 256 experts in 264 to 320 slots on 8 and 32 ranks, 2…5 and 1…8 all take 5…20 µs a layer.
_FIRST_SWEEPS = 3
_CHAIN_PASSES = 4
# Levelling may overshoot where an expert runs out of tokens, so after this many rounds only chains are used, each of
# which makes the split strictly better. 384 ranks in a chain, or with 1200 replicas at random, needed 9 rounds at most.
_LEVELLING_ROUNDS = 16


@compiled
def graph_size(num_experts, num_slots, num_ranks):
    """Entries of one layer's graph: two lengths, then the sections that `_sections` cuts out."""
    return 2 + 2 * (num_experts + 1) + 6 * num_slots + (num_ranks + 1)


@compiled
def _sections(graph, num_experts, num_slots, num_ranks):
    """Views of a graph, which is one array because a call pays for every array that crosses into compiled code.

    Returns:
        first_host: (E + 1,), the hosts of expert e are first_host[e] … first_host[e + 1] − 1.
        replicated: (R,), experts with two or more hosts, those with the fewest hosts first.
        host_rank: (S,), the rank of each host; S is the most hosts there can be.
        host_expert: (S,), the expert of each host.
        host_slots: (S,), the number of slots of each host.
        slot_host: (S,), the host that each slot belongs to.
        slot_twin: (S,), position of the slot among the slots of its host.
        hosts_at_rank: the hosts of replicated experts, rank by rank, and
        first_at_rank: (G + 1,), where each rank's begin.
    """
    at = 2
    first_host = graph[at : at + num_experts + 1]
    at += num_experts + 1
    replicated = graph[at : at + graph[0]]
    at += num_experts + 1
    host_rank = graph[at : at + num_slots]
    at += num_slots
    host_expert = graph[at : at + num_slots]
    at += num_slots
    host_slots = graph[at : at + num_slots]
    at += num_slots
    slot_host = graph[at : at + num_slots]
    at += num_slots
    slot_twin = graph[at : at + num_slots]
    at += num_slots
    hosts_at_rank = graph[at : at + graph[1]]
    at += num_slots
    first_at_rank = graph[at : at + num_ranks + 1]
    return (
        first_host,
        replicated,
        host_rank,
        host_expert,
        host_slots,
        slot_host,
        slot_twin,
        hosts_at_rank,
        first_at_rank,
    )


@compiled
def graphs_of(slot_to_expert, num_ranks, num_experts):
    """Graphs of all layers: slot_to_expert int64 (L, S) -> int64 (L, graph_size); no layer if an id is out of range."""
    num_layers, num_slots = slot_to_expert.shape
    for layer in range(num_layers):
        for slot in range(num_slots):
            if slot_to_expert[layer, slot] < 0 or slot_to_expert[layer, slot] >= num_experts:
                return np.zeros((0, 0), np.int64)
    graphs = np.zeros((num_layers, graph_size(num_experts, num_slots, num_ranks)), np.int64)
    for layer in range(num_layers):
        _find_hosts(slot_to_expert[layer], num_ranks, num_experts, graphs[layer])
        _find_replicated(graphs[layer], num_ranks, num_experts, num_slots)
    return graphs


@compiled
def _find_hosts(slot_to_expert, num_ranks, num_experts, graph):
    num_slots = slot_to_expert.shape[0]
    slots_per_rank = num_slots // num_ranks
    first_host, _, host_rank, host_expert, host_slots, slot_host, slot_twin, _, _ = _sections(
        graph, num_experts, num_slots, num_ranks
    )
    last_rank = np.full(num_experts, -1, np.int64)
    for slot in range(num_slots):
        expert = slot_to_expert[slot]
        if last_rank[expert] != slot // slots_per_rank:
            last_rank[expert] = slot // slots_per_rank
            first_host[expert + 1] += 1
    for expert in range(num_experts):
        first_host[expert + 1] += first_host[expert]
    end = first_host[:-1].copy()
    for slot in range(num_slots):
        expert = slot_to_expert[slot]
        rank = slot // slots_per_rank
        host = end[expert] - 1
        if host < first_host[expert] or host_rank[host] != rank:
            host += 1
            end[expert] += 1
            host_rank[host] = rank
            host_expert[host] = expert
        slot_host[slot] = host
        slot_twin[slot] = host_slots[host]
        host_slots[host] += 1


@compiled
def _find_replicated(graph, num_ranks, num_experts, num_slots):
    """Experts with a choice, fewest hosts first (the flexible ones then fill the gaps), and their hosts by rank."""
    first_host, _, host_rank, _, _, _, _, _, first_at_rank = _sections(graph, num_experts, num_slots, num_ranks)
    with_hosts = np.zeros(num_ranks + 2, np.int64)
    for expert in range(num_experts):
        hosts = first_host[expert + 1] - first_host[expert]
        if hosts > 1:
            with_hosts[hosts + 1] += 1
            for host in range(first_host[expert], first_host[expert + 1]):
                first_at_rank[host_rank[host] + 1] += 1
    for hosts in range(num_ranks + 1):
        with_hosts[hosts + 1] += with_hosts[hosts]
    for rank in range(num_ranks):
        first_at_rank[rank + 1] += first_at_rank[rank]
    graph[0] = with_hosts[num_ranks + 1]
    graph[1] = first_at_rank[num_ranks]
    _, replicated, _, _, _, _, _, hosts_at_rank, _ = _sections(graph, num_experts, num_slots, num_ranks)
    end = first_at_rank[:-1].copy()
    for expert in range(num_experts):
        hosts = first_host[expert + 1] - first_host[expert]
        if hosts > 1:
            replicated[with_hosts[hosts]] = expert
            with_hosts[hosts] += 1
            for host in range(first_host[expert], first_host[expert + 1]):
                hosts_at_rank[end[host_rank[host]]] = host
                end[host_rank[host]] += 1


@compiled
def _pour(tokens, begin, end, host_rank, flow, load):
    """Take one expert's tokens away and pour them back onto its hosts up to a common level."""
    count = end - begin
    total = tokens
    for host in range(begin, end):
        total += load[host_rank[host]]
        total -= flow[host]
    level = total // count
    while True:
        kept = 0
        total = tokens
        for host in range(begin, end):
            without = load[host_rank[host]] - flow[host]
            if without <= level:
                kept += 1
                total += without
        if kept == count:
            break
        count = kept
        level = total // count
    extra = total - level * count
    for host in range(begin, end):
        rank = host_rank[host]
        without = load[rank] - flow[host]
        share = 0
        if without <= level:
            share = level - without
            if extra > 0:
                share += 1
                extra -= 1
        flow[host] = share
        load[rank] = without + share


@compiled
def _sweep(num_tokens, first_host, host_rank, replicated, flow, load):
    for expert in replicated:
        if num_tokens[expert] > 0:
            _pour(num_tokens[expert], first_host[expert], first_host[expert + 1], host_rank, flow, load)


@compiled
def _level(first_host, host_rank, host_expert, hosts_at_rank, first_at_rank, flow, load):
    """Bring every set of ranks that share experts with tokens to one level, along a tree of such experts.

    Where an expert has too few tokens to move, all it has are moved and the set is cut there.
    """
    num_ranks = load.shape[0]
    order = np.empty(num_ranks, np.int64)
    give_host = np.empty(num_ranks, np.int64)  # host on the rank itself, and on its parent, of the expert between them
    take_host = np.empty(num_ranks, np.int64)
    seen_rank = np.zeros(num_ranks, np.bool_)
    seen_expert = np.zeros(first_host.shape[0] - 1, np.bool_)
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
                mine = hosts_at_rank[at]
                expert = host_expert[mine]
                if flow[mine] == 0 or seen_expert[expert]:
                    continue
                seen_expert[expert] = True
                for host in range(first_host[expert], first_host[expert + 1]):
                    other = host_rank[host]
                    if flow[host] > 0 and not seen_rank[other]:
                        seen_rank[other] = True
                        give_host[other] = host
                        take_host[other] = mine
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
            give = give_host[rank]
            take = take_host[rank]
            amount = min(max(load[rank] - goal, -flow[take]), flow[give])
            flow[give] -= amount
            flow[take] += amount
            load[rank] -= amount
            load[host_rank[take]] += amount


@compiled
def _improve(first_host, host_rank, host_expert, hosts_at_rank, first_at_rank, flow, load):
    """Move tokens along chains of hosts from a rank to one with at least two tokens fewer; returns how many chains.

    From the emptiest rank upwards, find every rank that can reach it, and no emptier one. The experts that lead to two
    different low ranks are different ones, so a chain to each can be used in one pass. No chain: the split is optimal.
    """
    num_ranks = load.shape[0]
    queue = np.empty(num_ranks, np.int64)
    from_host = np.empty(num_ranks, np.int64)
    to_host = np.empty(num_ranks, np.int64)
    seen_rank = np.zeros(num_ranks, np.bool_)
    seen_expert = np.zeros(first_host.shape[0] - 1, np.bool_)
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
                mine = hosts_at_rank[at]
                expert = host_expert[mine]
                if seen_expert[expert]:
                    continue
                seen_expert[expert] = True
                for host in range(first_host[expert], first_host[expert + 1]):
                    other = host_rank[host]
                    if flow[host] == 0 or seen_rank[other]:
                        continue
                    seen_rank[other] = True
                    from_host[other] = host
                    to_host[other] = mine
                    queue[size] = other
                    size += 1
                    if load[other] > load[high]:
                        high = other
        if load[high] >= load[low] + 2:
            chains += 1
            amount = (load[high] - load[low]) // 2
            step = high
            while step != low:
                amount = min(amount, flow[from_host[step]])
                step = host_rank[to_host[step]]
            load[high] -= amount
            load[low] += amount
            step = high
            while step != low:
                flow[from_host[step]] -= amount
                flow[to_host[step]] += amount
                step = host_rank[to_host[step]]


@compiled
def _balance(num_tokens, sections, flow, load):
    """Flows of one batch that make the rank loads lexicographically min-max. `flow` and `load` come in as zeros."""
    first_host, replicated, host_rank, host_expert, _, _, _, hosts_at_rank, first_at_rank = sections
    for expert in range(num_tokens.shape[0]):
        host = first_host[expert]
        if first_host[expert + 1] == host + 1:
            flow[host] = num_tokens[expert]
            load[host_rank[host]] += num_tokens[expert]
    for _ in range(_FIRST_SWEEPS - 1):
        _sweep(num_tokens, first_host, host_rank, replicated, flow, load)
    rounds = 0
    while True:
        if rounds < _LEVELLING_ROUNDS:
            _sweep(num_tokens, first_host, host_rank, replicated, flow, load)
            _level(first_host, host_rank, host_expert, hosts_at_rank, first_at_rank, flow, load)
        rounds += 1
        for _ in range(_CHAIN_PASSES):
            if _improve(first_host, host_rank, host_expert, hosts_at_rank, first_at_rank, flow, load) == 0:
                return


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
        sections = _sections(graphs[layer], num_experts, num_slots, num_ranks)
        first_host, _, _, _, host_slots, slot_host, slot_twin, _, _ = sections
        tokens = num_tokens[layer]
        for expert in range(num_experts):
            if tokens[expert] < 0 or (tokens[expert] > 0 and first_host[expert] == first_host[expert + 1]):
                return layer * num_experts + expert
        flow[:] = 0
        load[:] = 0
        _balance(tokens, sections, flow, load)
        for slot in range(num_slots):
            host = slot_host[slot]
            count = host_slots[host]
            per_slot[layer, slot] = flow[host] if count == 1 else (flow[host] + count - 1 - slot_twin[slot]) // count
    return -1
