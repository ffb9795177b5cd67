"""The `token` rule (Ascend's balance mode 1): the tokens of a rank take the replicas in turn, by row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evenmoe.rules.rank import LookupChooser
from evenmoe.rules.rule import Chooser, Counts, EvenRule, Mask
from evenmoe.rules.table import replicas_at

if TYPE_CHECKING:
    import torch


class TokenRule(EvenRule):
    """Shares are even in the limit of many tokens; with T, the first T mod count replicas get one more a rank."""

    name = "token"
    description = "The token in row i takes replica i mod replicas; Ascend's balance mode 1."
    balance_mode = 1
    kernel = 1

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """See `Rule.prepare`."""
        return TokenChooser(eplb_table)


class TokenChooser(LookupChooser):
    """One slot for every row of a batch, up to the least common multiple of the counts, and every expert.

    An id without a row gives the slot of another row: it must have been checked.
    """

    finds_wrong_ids = False

    def __init__(self, eplb_table: torch.Tensor) -> None:
        super().__init__(eplb_table.new_empty(0), len(eplb_table))
        self._table = eplb_table
        self._period = math.lcm(*set(eplb_table[:, 0].tolist()))
        self._row_offsets = eplb_table.new_empty((0, 1))

    def __call__(self, expert_ids: torch.Tensor, counted: Mask = None, counts_by_rank: Counts = None) -> torch.Tensor:
        """See `Chooser`."""
        self._grow(expert_ids)
        return self._look_up(expert_ids, expert_ids + self._row_offsets)

    def _grow(self, expert_ids: torch.Tensor) -> None:
        import torch

        num_experts, num_tokens, device = self._num_experts, len(expert_ids), self._table.device
        rows = min(self._period, num_tokens)
        if self._slots.numel() < rows * num_experts:
            replica = torch.arange(rows, device=device)[None, :] % self._table[:, :1]
            self._slots = replicas_at(self._table, replica).T.flatten()
            self._by_dtype.clear()
        if self._row_offsets.shape[0] != num_tokens or self._row_offsets.dtype != expert_ids.dtype:
            row = torch.arange(num_tokens, device=device) % self._period
            self._row_offsets = (row * num_experts).to(expert_ids.dtype)[:, None]


RULE = TokenRule()
