"""A replay in plain loops, which shares no code with the simulator: the oracle of its numbers.

It reads the trace's arrays itself, assigns tokens, chooses replicas, counts rows and copies, and prices them one by
one.
From the package it takes the planner (`evenmoe.plan`) and the split of a batch (`evenmoe.split_batch`), which have
oracles of their own; the published greedy is written again here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

import evenmoe as em


@dataclass
class Setup:
    """What a call of `evenmoe simulate` fixes for all policies."""

    ranks: int
    nodes: int
    tokens: int
    chunk: int
    steps: int
    refresh: int
    window: int
    slots: int
    # Costs, in FLOP, bytes, seconds.
    flops: float
    expert_bytes: float
    row_bytes: float
    flops_per_s: float = 1e15
    memory_per_s: float = 3e12
    within_per_s: float = 1.6e11
    between_per_s: float = 5e10
    latency: float = 20e-6
    start: float = 7e-6
    slot: float = 2e-6
    floor: float = 0.0
    row: float = 0.0
    norm: float = 2.0
    tile: int = 64
    once: bool = True
    first: int | None = None  # of policies that do not say a refresh; by default it
    horizon: int = 3000
    overlap: bool = True


@dataclass
class ByHand:
    """What the loops find for one policy."""

    par: list[list[float]] = field(default_factory=list)
    loads: list[list[list[int]]] = field(default_factory=list)  # step, layer, rank
    rows: list[list[int]] = field(default_factory=list)  # step; within, between, within once, between once
    copies: list[list[int]] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)
    copy_us: list[float] = field(default_factory=list)
    refreshes: list[int] = field(default_factory=list)
    memory: int = 0
    break_even: float = 0.0
    net_us: list[float] = field(default_factory=list)  # of the judged steps


def assign(starts: list[int], setup: Setup) -> list[list[list[int]]]:
    """Token numbers of every step and rank."""
    streams = setup.ranks * setup.tokens // setup.chunk
    work: list[list[int]] = [[] for _ in range(streams)]
    request = 0
    steps = []
    for _ in range(setup.steps):
        batch: list[list[int]] = [[] for _ in range(setup.ranks)]
        for stream in range(streams):
            for _ in range(setup.chunk):
                while not work[stream]:
                    work[stream] = list(range(starts[request], starts[request + 1]))
                    request = (request + 1) % (len(starts) - 1)
                batch[stream // (setup.tokens // setup.chunk)].append(work[stream].pop(0))
        steps.append(batch)
    return steps


def greedy(load: list[float], setup: Setup, slots: int) -> list[int]:
    """DeepSeek's global greedy for one layer."""
    count = [1] * len(load)
    replicas = list(range(len(load)))
    while len(replicas) < slots:
        hottest = max(range(len(load)), key=lambda expert: (load[expert] / count[expert], -expert))
        count[hottest] += 1
        replicas.append(hottest)
    share = [load[expert] / count[expert] for expert in replicas]
    bins: list[list[int]] = [[] for _ in range(setup.ranks)]
    weight = [0.0] * setup.ranks
    for replica in sorted(range(slots), key=lambda replica: (-share[replica], replica)):
        free = [rank for rank in range(setup.ranks) if len(bins[rank]) < slots // setup.ranks]
        lightest = min(free, key=lambda rank: (weight[rank], rank))
        bins[lightest].append(replicas[replica])
        weight[lightest] += share[replica]
    return [expert for held in bins for expert in held]


def choose(placement: em.Placement, layer: int, batch: list[list[list[int]]], rule: str) -> list[list[list[int]]]:
    """The slot of every assignment: batch[rank][token][k] is an expert."""
    ranks = len(batch)
    row = {expert: [] for expert in range(placement.num_experts)}
    for slot in sorted(range(placement.num_slots), key=lambda slot: placement.replica_index[layer, slot]):
        row[int(placement.slot_to_expert[layer, slot])].append(slot)
    line: dict[int, list[int]] = {}
    if rule == "batch":
        total = [0] * placement.num_experts
        for tokens in batch:
            for experts in tokens:
                for expert in experts:
                    total[expert] += 1
        quota = em.split_batch(np.array(total), placement.slot_to_expert[layer], ranks).tolist()
        line = {expert: [slot for slot in slots for _ in range(quota[slot])] for expert, slots in row.items()}
    everywhere = [0] * placement.num_experts
    chosen = []
    for rank, tokens in enumerate(batch):
        here = [0] * placement.num_experts
        chosen.append([])
        for number, experts in enumerate(tokens):
            chosen[rank].append([])
            for expert in experts:
                slots = row[expert]
                if rule == "rank":
                    slot = slots[rank // math.ceil(ranks / len(slots))]
                elif rule == "token":
                    slot = slots[number % len(slots)]
                elif rule == "occurrence":
                    slot = slots[(here[expert] + rank + expert) % len(slots)]
                elif rule == "even":
                    slot = slots[(everywhere[expert] + expert) % len(slots)]
                else:
                    assert rule == "batch", rule
                    slot = line[expert][everywhere[expert]]
                here[expert] += 1
                everywhere[expert] += 1
                chosen[rank][number].append(slot)
    return chosen


def kernel_time(rows: dict[int, int], width: int, setup: Setup) -> float:
    """Seconds of a rank's experts, from the rows of each of its slots that has any."""
    if not rows:
        return 0.0
    tiles = sum(math.ceil(number / setup.tile) for number in rows.values())
    compute = tiles * setup.tile * setup.flops / setup.flops_per_s
    read = len(rows) * setup.expert_bytes / setup.memory_per_s
    both = (read**setup.norm + compute**setup.norm) ** (1 / setup.norm)
    call = setup.start + setup.slot * width**0.8 + both + setup.row * sum(rows.values())
    return (setup.floor**8 + call**8) ** 0.125


def serve_layer(placement: em.Placement, layer: int, chosen: list[list[list[int]]], setup: Setup):
    """Loads of the ranks, rows of four kinds, and microseconds of one layer."""
    ranks, width, near = setup.ranks, placement.num_slots // setup.ranks, setup.ranks // setup.nodes
    loads = [0] * ranks
    busy: list[dict[int, int]] = [{} for _ in range(ranks)]
    sent = [[0] * ranks for _ in range(4)]
    received = [[0] * ranks for _ in range(4)]
    for rank, tokens in enumerate(chosen):
        for slots in tokens:
            targets = [slot // width for slot in slots]
            for slot, target in zip(slots, targets, strict=True):
                loads[target] += 1
                busy[target][slot] = busy[target].get(slot, 0) + 1
            for kinds, goals in ((0, targets), (2, sorted(set(targets)))):
                for target in goals:
                    if target == rank:
                        continue
                    kind = kinds + (target // near != rank // near)
                    sent[kind][rank] += 1
                    received[kind][target] += 1
    work = max(kernel_time(rows, width, setup) for rows in busy)
    way = 2 if setup.once else 0
    wire = max(
        max(sent[way + link][rank], received[way + link][rank]) * 2 * setup.row_bytes / speed
        for link, speed in enumerate((setup.within_per_s, setup.between_per_s))
        for rank in range(ranks)
    )
    rows = [sum(kind) for kind in sent]
    return loads, rows, (work + wire + 2 * setup.latency) * 1e6


def copy(before: em.Placement, after: em.Placement, setup: Setup) -> tuple[list[int], float]:
    """Copies of every layer, and microseconds of all."""
    near = setup.ranks // setup.nodes
    sent = [[0] * setup.ranks for _ in range(2)]
    received = [[0] * setup.ranks for _ in range(2)]
    copies = []
    for layer in range(after.num_layers):
        old = before.slot_to_expert[layer].tolist()
        holders: dict[int, set[int]] = {}
        for slot, expert in enumerate(old):
            holders.setdefault(expert, set()).add(slot // (len(old) // setup.ranks))
        copies.append(0)
        new = after.slot_to_expert[layer].tolist()
        for slot, expert in enumerate(new):
            target = slot // (len(new) // setup.ranks)
            if target in holders[expert]:
                continue
            copies[-1] += 1
            neighbours = [rank for rank in sorted(holders[expert]) if rank // near == target // near]
            link = 0 if neighbours else 1
            source = min(neighbours or sorted(holders[expert]), key=lambda rank: (sent[link][rank], rank))
            sent[link][source] += 1
            received[link][target] += 1
    if not any(copies):
        return copies, 0.0
    slowest = max(
        max(sent[link][rank], received[link][rank]) * setup.expert_bytes / speed
        for link, speed in enumerate((setup.within_per_s, setup.between_per_s))
        for rank in range(setup.ranks)
    )
    return copies, (slowest + setup.latency) * 1e6


def plan_by_hand(kind: str, rule: str, load: np.ndarray, setup: Setup, current: em.Placement, is_first: bool, options):
    if kind == "greedy":
        slots = [greedy(layer.tolist(), setup, setup.slots) for layer in load]
        return em.Placement(slots, setup.ranks, num_experts=load.shape[1])
    shape = {"num_ranks": setup.ranks, "num_slots": setup.slots, "num_nodes": setup.nodes}
    start = options.get("start", "first")
    if kind == "evenmoe" and (start == "previous" or (start == "first" and not is_first)):
        bound = options.get("max_copies", max(1, setup.slots // 8))
        return em.plan(load, **shape, rule=rule, previous=current, max_copies=bound)
    return em.plan(load, **shape, rule="even" if kind == "oracle" else rule)


def replay(routing: np.ndarray, starts: list[int], experts: int, setup: Setup, policies) -> dict[str, ByHand]:
    """`policies`: (name, kind, rule, options of the plan)."""
    layers = routing.shape[1]
    batches = assign(starts, setup)
    found: dict[str, ByHand] = {}
    for name, kind, rule, options in policies:
        result = found[name] = ByHand()
        fewest = math.ceil(experts / setup.ranks) * setup.ranks
        slots = fewest if kind == "identity" else setup.slots
        current = em.Placement([[s % experts for s in range(slots)]] * layers, setup.ranks)
        past: list[np.ndarray] = []
        is_first = True
        coming, waiting = None, 0.0  # a placement whose copies are under way, and their time left
        for step, tokens in enumerate(batches):
            batch = [[[routing[token, layer].tolist() for token in rank] for rank in tokens] for layer in range(layers)]
            load = np.zeros((layers, experts))
            for layer in range(layers):
                for rank in batch[layer]:
                    for chosen in rank:
                        for expert in chosen:
                            load[layer, expert] += 1
            refresh, window = options.get("refresh", setup.refresh), options.get("window", setup.window)
            first = options.get("refresh", setup.first or refresh)
            due = (kind == "static" and step == window) or (
                kind in ("greedy", "evenmoe") and step >= first and (step - first) % refresh == 0
            )
            copies, spent = [0] * layers, 0.0
            if coming is not None and waiting <= 0:
                current, coming = coming, None
            if (due and coming is None) or kind == "oracle":
                seen = load if kind == "oracle" else sum(past[max(0, step - window) :])
                new = plan_by_hand(kind, rule, seen, setup, current, is_first, options)
                is_first = False
                if new != current and step > 0:
                    copies, spent = copy(current, new, setup)
                    result.refreshes.append(step)
                if setup.overlap and kind != "oracle" and len(result.refreshes) > 1 and spent > 0:
                    coming, waiting = new, spent
                else:
                    current = new
            result.copies.append(copies)
            result.copy_us.append(0.0 if kind == "oracle" else spent)
            parts = [serve_layer(current, n, choose(current, n, batch[n], rule), setup) for n in range(layers)]
            result.loads.append([loads for loads, _, _ in parts])
            result.par.append([max(loads) / (sum(loads) / len(loads)) for loads, _, _ in parts])
            result.rows.append([sum(rows[kind] for _, rows, _ in parts) for kind in range(4)])
            result.step_us.append(sum(time for _, _, time in parts))
            waiting -= result.step_us[-1]
            past.append(load)
        result.memory = round(layers * slots // setup.ranks * setup.expert_bytes)
    begin, end = judged_steps(batches, policies, setup)
    base = next(iter(found.values())).step_us[begin:end]
    for result in found.values():
        steps = result.step_us[begin:end]
        once = result.copy_us[result.refreshes[0]] if result.refreshes else 0.0
        if setup.overlap:
            share = min(1.0, once / (sum(base) / len(base)) / setup.horizon)
            result.net_us = [share * old + (1 - share) * new for old, new in zip(base, steps, strict=True)]
        else:
            later = [0.0 if [n] == result.refreshes[:1] else time for n, time in enumerate(result.copy_us)]
            result.net_us = [
                step + copy + once / setup.horizon for step, copy in zip(steps, later[begin:end], strict=True)
            ]
        if sum(result.copy_us) > 0:
            gain = (sum(base) - sum(steps)) / len(base)
            spent = sum(result.copy_us) / len(result.refreshes)
            result.break_even = spent / gain if gain > 0 else math.inf
    return found


def judged_steps(batches: list[list[list[int]]], policies, setup: Setup) -> tuple[int, int]:
    """From the last first plan to the first step with a token that an earlier step has had; else all steps."""
    begin = 0
    for _, kind, _, options in policies:
        if kind == "static":
            begin = max(begin, options.get("window", setup.window))
        if kind in ("greedy", "evenmoe"):
            begin = max(begin, options.get("refresh", setup.first or setup.refresh))
    seen: set[int] = set()
    end = 0
    for batch in batches:
        tokens = {token for rank in batch for token in rank}
        if tokens & seen:
            break
        seen |= tokens
        end += 1
    return (begin, end) if begin < end else (0, len(batches))
