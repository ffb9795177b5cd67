"""The `occurrence` rule: a rank's assignments of an expert go to its replicas in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evenmoe.rules.rule import Chooser, Counts, EvenRule, Mask
from evenmoe.rules.table import as_arrays, check_mask, number_assignments, raise_at

if TYPE_CHECKING:
    import torch


class OccurrenceRule(EvenRule):
    """Shares are even already with few tokens."""

    name = "occurrence"
    description = "The j-th assignment of expert e on rank r takes replica (j + r + e) mod replicas."
    balance_mode = 2
    kernel = 2

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """See `Rule.prepare`."""
        return OccurrenceChooser(self, eplb_table, rank, world_size)


class OccurrenceChooser(Chooser):
    finds_wrong_ids = True

    def __call__(self, expert_ids: torch.Tensor, counted: Mask = None, counts_by_rank: Counts = None) -> torch.Tensor:
        """See `Chooser`; raises ConstraintError for an id without a row on the CPU."""
        return choose(expert_ids, self._table, self._rank, counted)


RULE = OccurrenceRule()


def choose(
    expert_ids: torch.Tensor, eplb_table: torch.Tensor, rank: int, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The j-th assignment of expert e on this rank goes to replica (j + rank + e) mod count, j from 0, row-major.

    Rank and expert shift the start, so that the ranks' first assignments do not all meet on replica 0. Unlike the token
    rule it stays even when few of the tokens pick the expert: with 8 ranks, 128 tokens each, 6 replicas and a
    quarter of the tokens, the busiest replica has 1.03 times the mean, against 1.17 by token and 1.67 by rank.

    Args:
        expert_ids: int32 or int64 (Bs, K), logical experts 0…E−1, on any device.
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care].
        rank: of the calling rank, 0 or more.
        counted: bool (Bs, K) or None. What is False (padding, pruned) is not counted, and still gets a slot.

    Returns:
        Slot ids, (Bs, K) of the dtype of `expert_ids`.

    Raises:
        ConstraintError: a mask of another shape; on the CPU also an id without a row, or a row that counts no replica.

    Expert 1 has the slots 1 and 7. Rank 0 starts with replica (0 + 0 + 1) mod 2, slot 7; rank 1 with slot 1:

    >>> import torch
    >>> table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    >>> ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    >>> choose(ids, table, rank=0).tolist(), choose(ids, table, rank=1).tolist()
    ([[0, 7], [1, 0], [7, 0]], [[0, 1], [7, 0], [1, 0]])
    """
    check_mask(expert_ids, counted)
    if expert_ids.device.type != "cpu":
        return _choose_anywhere(expert_ids, eplb_table, rank, counted)
    from evenmoe.rules import choose_kernels  # not at the top: importing numba takes 0.3 s

    chosen = expert_ids.new_empty(expert_ids.shape)
    experts, table, mask = as_arrays(expert_ids, eplb_table, counted)
    wrong = choose_kernels.choose_by_occurrence(experts, table, rank, mask, chosen.view(-1).numpy())
    if wrong >= 0:
        raise_at(expert_ids, eplb_table, wrong)
    return chosen


def _choose_anywhere(
    expert_ids: torch.Tensor, eplb_table: torch.Tensor, rank: int, counted: torch.Tensor | None
) -> torch.Tensor:
    """The same without a loop, for accelerators."""
    experts = expert_ids.long()
    replica = (number_assignments(experts, counted) + rank + experts) % eplb_table[experts, 0]
    return eplb_table[experts, 1 + replica].to(expert_ids.dtype)
