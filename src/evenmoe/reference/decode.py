"""The split of a decode batch, whose ranks pay for the weights that they read and for their rows, in plain loops."""

from __future__ import annotations

Flows = dict[tuple[int, int], int]  # rows by (expert, rank), where there are any


def split_decode(
    num_tokens: list[int], slots: list[list[int]], weight_rows: int, even: list[list[int]]
) -> list[list[int]]:
    """Rows that every slot takes, so that the costliest rank costs little: the steps of `evenmoe.split_batch`.

    A rank costs `weight_rows` for each expert that it has rows of, and its rows. Two starts are improved by `improve`:
    one replica an expert with the fewest experts on a rank, and then, unless that is the least there can be, `even`
    where rows are more than a quarter of the weights' worth, or else the largest experts first. The better one is
    taken, of equals the first. If an expert has several slots on a rank, the first takes all rows.

    Args:
        num_tokens: rows of each expert, over all ranks.
        slots: of each rank, the expert in each of its slots.
        weight_rows: rows that one expert's weights are worth, more than 0.
        even: of each rank, the rows of each slot in the split that leaves weights out.

    Raises:
        KeyError: an expert with rows that has no slot.

    Weights are worth 10 rows; expert 0 is on both ranks, and expert 1 has nothing to do:

    >>> split_decode([6, 0, 3], [[0, 1], [0, 2]], weight_rows=10, even=[[5, 0], [1, 3]])
    [[6, 0], [0, 3]]
    """
    holding: dict[int, list[int]] = {}
    for rank, experts in enumerate(slots):
        for expert in sorted(set(experts)):
            holding.setdefault(expert, []).append(rank)
    active = {expert: rows for expert, rows in enumerate(num_tokens) if rows > 0}
    # By the number of ranks that hold them, and by number: the order in which experts choose.
    order = sorted(active, key=lambda expert: (len(holding[expert]), expert))
    rows, weights = sum(active.values()), weight_rows * len(active)
    alone = {(expert, holding[expert][0]): active[expert] for expert in order if len(holding[expert]) == 1}
    floor = max([-(-(rows + weights) // len(slots)), *costs_of(alone, len(slots), weight_rows)])

    homes = assign_one(order, holding, len(slots))
    best = {(expert, homes[expert]): active[expert] for expert in order}
    improve(best, holding, len(slots), weight_rows, floor)
    peak = max(costs_of(best, len(slots), weight_rows))
    if peak > floor:
        if 4 * rows > weights:
            second = _flows(slots, even)
        else:
            replicated = sorted((expert for expert in order if len(holding[expert]) > 1), key=lambda e: -active[e])
            second = by_size({expert: active[expert] for expert in replicated}, alone, holding, len(slots), weight_rows)
        improve(second, holding, len(slots), weight_rows, floor)
        if max(costs_of(second, len(slots), weight_rows)) < peak:
            best = second
    return [
        [best.get((expert, rank), 0) if expert not in experts[:slot] else 0 for slot, expert in enumerate(experts)]
        for rank, experts in enumerate(slots)
    ]


def _flows(slots: list[list[int]], rows: list[list[int]]) -> Flows:
    flows: Flows = {}
    for rank, (experts, taken) in enumerate(zip(slots, rows, strict=True)):
        for expert, number in zip(experts, taken, strict=True):
            if number > 0:
                flows[expert, rank] = flows.get((expert, rank), 0) + number
    return flows


def by_size(
    active: dict[int, int], alone: Flows, holding: dict[int, list[int]], num_ranks: int, weight_rows: int
) -> Flows:
    """`alone`, and every expert of `active` in turn on the rank that costs least of those that hold it.

    >>> by_size({0: 6}, {(2, 1): 3}, {0: [0, 1], 2: [1]}, 2, weight_rows=10)
    {(2, 1): 3, (0, 0): 6}
    """
    flows = dict(alone)
    for expert, rows in active.items():
        costs = costs_of(flows, num_ranks, weight_rows)
        flows[expert, min(holding[expert], key=lambda rank: costs[rank])] = rows
    return flows


def costs_of(flows: Flows, num_ranks: int, weight_rows: int) -> list[int]:
    """What each rank costs: its rows, and `weight_rows` for each expert that it has rows of.

    >>> costs_of({(0, 0): 6, (2, 1): 3}, 2, weight_rows=10)
    [16, 13]
    """
    costs = [0] * num_ranks
    for (_, rank), rows in flows.items():
        costs[rank] += rows + weight_rows
    return costs


def assign_one(order: list[int], holding: dict[int, list[int]], num_ranks: int) -> dict[int, int]:
    """One rank for every expert of `order`, so that the most experts that one rank gets are as few as can be.

    Each takes the rank with the fewest so far; then experts move along chains, from a rank with the most to one with
    two fewer, until none is in reach of the first rank with the most.

    >>> assign_one([1, 0, 2], {0: [0, 1], 1: [0], 2: [0, 1]}, 2)
    {1: 0, 0: 1, 2: 0}
    """
    homes: dict[int, int] = {}
    counts = [0] * num_ranks
    for expert in order:
        homes[expert] = min(holding[expert], key=lambda rank: counts[rank])
        counts[homes[expert]] += 1
    while True:
        top = counts.index(max(counts))
        chain = _chain(top, homes, holding, counts)
        if chain is None:
            return homes
        for expert, rank in chain:
            counts[homes[expert]] -= 1
            homes[expert] = rank
            counts[rank] += 1


def _chain(
    top: int, homes: dict[int, int], holding: dict[int, list[int]], counts: list[int]
) -> list[tuple[int, int]] | None:
    """Experts and where they go, from `top` to the nearest rank with two experts fewer; None if there is none."""
    came: dict[int, list[tuple[int, int]]] = {top: []}
    queue = [top]
    while queue:
        rank = queue.pop(0)
        for expert in sorted(expert for expert, home in homes.items() if home == rank):
            for other in holding[expert]:
                if other not in came:
                    came[other] = [(expert, other), *came[rank]]
                    queue.append(other)
                    if counts[other] + 2 <= counts[top]:
                        return came[other]
    return None


def improve(flows: Flows, holding: dict[int, list[int]], num_ranks: int, weight_rows: int, floor: int) -> None:
    """Change `flows` by the best move off the costliest rank, again and again, until none helps or it costs `floor`.

    The best move leaves the least cost on the dearest of the ranks that it touches, and that must be below the peak by
    a 1024th of it; of equals the first, in the order in which they are tried here.
    """
    while True:
        costs = costs_of(flows, num_ranks, weight_rows)
        top = costs.index(max(costs))
        if costs[top] <= floor:
            return
        best, chosen = costs[top] - costs[top] // 1024, None
        for move in _moves(top, costs, flows, holding, weight_rows):
            after = dict(flows)
            _apply(after, move)
            new = costs_of(after, num_ranks, weight_rows)
            highest = max(new[rank] for _, give, take, _ in move for rank in (give, take))
            if highest < best:
                best, chosen = highest, move
        if chosen is None:
            return
        _apply(flows, chosen)


Move = list[tuple[int, int, int, int]]  # expert, from rank, to rank, rows


def _moves(top: int, costs: list[int], flows: Flows, holding: dict[int, list[int]], weight_rows: int) -> list[Move]:
    """All rows of an expert; so many that both ranks cost the same; all, while another expert goes on from there."""
    moves: list[Move] = []
    for expert in sorted(holding):
        rows = flows.get((expert, top), 0)
        if rows == 0:
            continue
        for rank in holding[expert]:
            if rank == top:
                continue
            whole = (expert, top, rank, rows)
            moves.append([whole])
            weights = 0 if (expert, rank) in flows else weight_rows
            part = (costs[top] - costs[rank] - weights) // 2
            if 0 < part < rows:
                moves.append([(expert, top, rank, part)])
            for other in sorted(holding):
                gone = flows.get((other, rank), 0)
                if gone and other != expert:
                    moves += [[whole, (other, rank, third, gone)] for third in holding[other] if third != rank]
    return moves


def _apply(flows: Flows, move: Move) -> None:
    for expert, give, take, rows in move:
        flows[expert, give] -= rows
        if flows[expert, give] == 0:
            del flows[expert, give]
        flows[expert, take] = flows.get((expert, take), 0) + rows
