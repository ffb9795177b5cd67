"""MoeEPLBUpdateExpert / MoeUpdateExpert: logical expert ids to physical ones, and the pruning mask (§1).

And the replica rules that count, pick by pick: `occurrence` and `batch`.
"""

from __future__ import annotations

import torch

from evenmoe.reference.world import ceil_div


def update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace every logical expert by one of its replicas, and drop the experts whose weight is too small.

    Args:
        expert_ids: int32 or int64 (Bs,K), logical experts 0…E−1.
        eplb_table: int32 (E,F). Row e = [count, id_1 … id_count, don't care].
        local_rank_id, world_size: this rank and the number of ranks; read only in mode 0.
        balance_mode: 0 = replica by rank, 1 = replica by token row.
        expert_scales: float (Bs,K) gate weights, or None. Pruning is on when this and the threshold are given.
        pruning_threshold: float32 (K,) or (1,K), by position in the top-k list.
        active_mask: bool (Bs,); rows that are False are masked out entirely. Read only when pruning is on.

    Returns:
        The physical ids, (Bs,K) of the ids' dtype, and the mask, bool (Bs,K), all True when pruning is off (the
        operator leaves it unwritten then).

    The K weights of a token are added in fp32 in ascending k (the chip's order is unknown, §1.5). Source: §1.3, §1.5.

    >>> table = torch.tensor([[1, 0, -1], [2, 1, 2]], dtype=torch.int32)  # expert 1 has the replicas 1 and 2
    >>> ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    >>> update_expert(ids, table, local_rank_id=3, world_size=4)[0].tolist()  # rank 3 of 4: second half, replica 2
    [[0, 2], [2, 0]]
    >>> update_expert(ids, table, balance_mode=1)[0].tolist()  # row 0 takes the first replica, row 1 the second
    [[0, 1], [2, 0]]
    >>> weights, threshold = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0.0, 0.5])
    >>> update_expert(ids, table, balance_mode=1, expert_scales=weights, pruning_threshold=threshold)[1].tolist()
    [[True, False], [True, True]]
    """
    num_tokens, top_k = expert_ids.shape
    balanced_ids = torch.zeros_like(expert_ids)
    balanced_mask = torch.ones((num_tokens, top_k), dtype=torch.bool)
    for token in range(num_tokens):
        for k in range(top_k):
            row = eplb_table[int(expert_ids[token, k])].tolist()
            count = row[0]
            if count == 1:
                column = 1
            elif balance_mode == 0:
                column = local_rank_id // ceil_div(world_size, count) + 1
            else:
                column = token % count + 1
            assert 1 <= column <= count
            balanced_ids[token, k] = row[column]
    if expert_scales is None or pruning_threshold is None:
        return balanced_ids, balanced_mask
    threshold = pruning_threshold.float().reshape(top_k)
    for token in range(num_tokens):
        scales = expert_scales[token].float()
        total = torch.tensor(0.0, dtype=torch.float32)
        for k in range(top_k):
            total = total + scales[k]
        for k in range(top_k):
            keep = bool(scales[k] >= threshold[k] * total)
            balanced_mask[token, k] = keep and (active_mask is None or bool(active_mask[token]))
    return balanced_ids, balanced_mask


def occurrence(
    expert_ids: torch.Tensor, eplb_table: torch.Tensor, rank: int, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The j-th counted assignment to expert e on this rank goes to replica (j + rank + e) mod count.

    Args:
        expert_ids: int32 or int64 (Bs,K), logical experts.
        eplb_table: int32 (E,F). Row e = [count, id_1 … id_count, don't care].
        rank: of the calling rank.
        counted: bool (Bs,K) or None (all are). One that is not counted still gets a replica.

    Returns:
        Physical ids, (Bs,K) of the ids' dtype.

    >>> table = torch.tensor([[3, 4, 5, 6]], dtype=torch.int32)
    >>> occurrence(torch.zeros((4, 1), dtype=torch.int32), table, rank=1).tolist()
    [[5], [6], [4], [5]]
    """
    numbers = [0] * eplb_table.shape[0]
    physical = torch.zeros_like(expert_ids)
    for token in range(expert_ids.shape[0]):
        for k in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, k])
            row = eplb_table[expert].tolist()
            physical[token, k] = row[1 + (numbers[expert] + rank + expert) % row[0]]
            if counted is None or counted[token, k]:
                numbers[expert] += 1
    return physical


def batch(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: list[int],
    counts_by_rank: list[list[int]],
    rank: int,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Line up an expert's assignments, rank after rank, and its slots in table order, each as often as its quota.

    The assignment at a position gets the slot there, or the last slot where the line of slots is too short.

    Args:
        expert_ids, eplb_table, counted: as in `occurrence`.
        quotas: (S,), assignments that each slot takes.
        counts_by_rank: (W,E), counted assignments per rank and logical expert.
        rank: of the calling rank.

    Returns:
        Physical ids, (Bs,K) of the ids' dtype.

    >>> table = torch.tensor([[2, 1, 0]], dtype=torch.int32)
    >>> batch(torch.zeros((3, 1), dtype=torch.int32), table, [3, 2], [[1], [3], [1]], rank=1).tolist()
    [[1], [0], [0]]
    """
    lines = []
    for row in eplb_table.tolist():
        slots = row[1 : 1 + row[0]]
        lines.append([slot for slot in slots for _ in range(quotas[slot])])
    place = [sum(counts_by_rank[other][expert] for other in range(rank)) for expert in range(len(lines))]
    physical = torch.zeros_like(expert_ids)
    for token in range(expert_ids.shape[0]):
        for k in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, k])
            row = eplb_table[expert].tolist()
            line = lines[expert]
            physical[token, k] = line[place[expert]] if place[expert] < len(line) else row[row[0]]
            if counted is None or counted[token, k]:
                place[expert] += 1
    return physical
