"""The replica rules that count, pick by pick: `occurrence` and `batch`; rank and token are in update_expert."""

from __future__ import annotations

import torch


def occurrence(
    expert_ids: torch.Tensor, eplb_table: torch.Tensor, rank: int, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The j-th counted pick of expert e on this rank goes to replica (j + rank + e) mod count.

    Args:
        expert_ids: int32 or int64 (Bs,K), logical experts.
        eplb_table: int32 (E,F). Row e = [count, id_1 … id_count, don't care].
        rank: of the calling rank.
        counted: bool (Bs,K) or None (every pick counts). A pick that is not counted still gets a replica.

    Returns:
        Physical ids, (Bs,K) of the ids' dtype.

    >>> table = torch.tensor([[3, 4, 5, 6]], dtype=torch.int32)
    >>> occurrence(torch.zeros((4, 1), dtype=torch.int32), table, rank=1).tolist()
    [[5], [6], [4], [5]]
    """
    picks = [0] * eplb_table.shape[0]
    physical = torch.zeros_like(expert_ids)
    for token in range(expert_ids.shape[0]):
        for k in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, k])
            row = eplb_table[expert].tolist()
            physical[token, k] = row[1 + (picks[expert] + rank + expert) % row[0]]
            if counted is None or counted[token, k]:
                picks[expert] += 1
    return physical


def batch(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: list[int],
    counts_by_rank: list[list[int]],
    rank: int,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Line up an expert's picks, rank after rank, and the slots of its table row, each as often as its quota.

    The pick at a place gets the slot at that place, or the last slot where the line of slots is too short.

    Args:
        expert_ids, eplb_table, counted: as in `occurrence`.
        quotas: (S,), picks that each slot takes.
        counts_by_rank: (W,E), counted picks per rank and logical expert.
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
