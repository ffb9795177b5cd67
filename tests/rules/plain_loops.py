"""The plain loops of the rules by which a rank chooses alone, by the rule's name; `RULES` must not have one without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evenmoe.reference.update_expert import occurrence, update_expert

#: (expert_ids, eplb_table, rank, world_size, counted) -> slot ids; the arguments are those of `Rule.choose`.
PlainLoop = Callable[[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None], torch.Tensor]

PLAIN_LOOPS: dict[str, PlainLoop] = {
    "rank": lambda ids, table, rank, world, counted: update_expert(ids, table, local_rank_id=rank, world_size=world)[0],
    "token": lambda ids, table, rank, world, counted: update_expert(ids, table, balance_mode=1)[0],
    "occurrence": lambda ids, table, rank, world, counted: occurrence(ids, table, rank, counted),
}
