"""The `batch` rule: the tokens of an expert over all ranks are one line, cut at the quotas of its replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.rules.rule import Chooser, Counts, Mask, Rule
from evenmoe.rules.split_batch import SplitPlan, checked_weight_rows
from evenmoe.rules.table import as_arrays, check_mask, counted_entries, number_assignments, raise_at

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]


class BatchRule(Rule):
    """Every batch is split so that the busiest rank has the fewest tokens, or in decode the least to read and compute.

    Attributes:
        weight_rows: rows that an expert's weights are worth, as in `evenmoe.split_batch`; 0 for tokens alone.

    Raises:
        ConstraintError: no whole number from 0 to 2**40.

    All six tokens go to one replica where the weights of an expert are worth as much as 150 of them:

    >>> placement = Placement([[0, 1, 0, 2]], num_ranks=2)
    >>> BatchRule(weight_rows=150).slot_loads([[6, 0, 3]], placement).tolist()
    [[6.0, 0.0, 0.0, 3.0]]
    """

    name = "batch"
    description = "The best split of every batch over all ranks, which know each other's counts."
    plan_for = "batch"
    needs_counts = True
    kernel = 3

    def __init__(self, weight_rows: int = 0) -> None:
        self.weight_rows = checked_weight_rows(weight_rows)
        if self.weight_rows:  # ranks with other weights would split otherwise
            self.version = f"weight_rows {self.weight_rows}"

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """See `Rule.prepare`.

        Raises:
            ConstraintError: a slot of no expert.
        """
        return BatchChooser(eplb_table, num_slots, rank, world_size, self.weight_rows)

    def shares(self, placement: Placement) -> None:
        """None: the shares follow from the load."""

    def _slot_loads(self, tokens: FloatArray, placement: Placement) -> FloatArray:
        """Every window counts as one batch with its own best split."""
        sizes = placement.rank_sizes
        plan = SplitPlan(placement.slot_to_expert, len(sizes), placement.num_experts, rank_sizes=sizes)
        return plan.split_load(tokens, weight_rows=self.weight_rows)


class BatchChooser(Chooser):
    finds_wrong_ids = True

    def __init__(
        self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int, weight_rows: int = 0
    ) -> None:
        self._weight_rows = weight_rows
        self._table, self._num_slots, self._rank, self._world_size = eplb_table, num_slots, rank, world_size
        self._experts, self._slots = counted_entries(eplb_table)
        held = np.full(num_slots, -1, np.int64)
        held[self._slots] = self._experts
        if (held < 0).any():
            slot = int(np.argmax(held < 0))
            raise ConstraintError(
                "eplb_table",
                f"without slot {slot}",
                f"must name all {num_slots} slots for the batch rule, which splits over what every rank holds",
                "give the slot an expert, or use the occurrence rule",
            )
        self._split = SplitPlan(held, world_size, num_experts=len(eplb_table))

    def __call__(self, expert_ids: torch.Tensor, counted: Mask = None, counts_by_rank: Counts = None) -> torch.Tensor:
        """See `Chooser`; `counts_by_rank` must be given."""
        assert counts_by_rank is not None
        quotas = self._quotas(counts_by_rank)
        return choose(expert_ids, self._table, quotas, counts_by_rank, self._rank, counted)

    def slot_counts(self, counts_by_rank: IntArray) -> IntArray:
        """Int64 (W, S), see `Chooser`.

        All ranks compute the same, since the split is exact in integers and a function of the counts alone: rank r's
        assignments of an expert and a slot's quota of them are two intervals of one line; their overlap is sent.
        """
        quotas = self._quotas(counts_by_rank)[self._slots]
        first_of_expert = np.searchsorted(self._experts, np.arange(counts_by_rank.shape[1]))
        stop = np.cumsum(quotas)
        start = stop - quotas
        base = start[first_of_expert][self._experts]
        start, stop = start - base, stop - base
        rank_stop = np.cumsum(counts_by_rank, axis=0)[:, self._experts]
        rank_start = rank_stop - counts_by_rank[:, self._experts]
        counts = np.zeros((self._world_size, self._num_slots), np.int64)
        counts[:, self._slots] = np.maximum(np.minimum(rank_stop, stop) - np.maximum(rank_start, start), 0)
        return counts

    def _quotas(self, counts_by_rank: IntArray) -> IntArray:
        return self._split.split(counts_by_rank.sum(axis=0), weight_rows=self._weight_rows)


RULE = BatchRule()


def choose(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: IntArray | torch.Tensor,
    counts_by_rank: IntArray | torch.Tensor,
    rank: int,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's assignments of expert e are an interval of all; each goes to the replica whose quota covers it.

    The interval begins after those of the lower ranks. The replicas' quotas follow one another in the order of the
    table row. What is beyond the last quota goes to the last replica, so every assignment gets a replica of its expert
    even if ranks disagree about quotas or counts: that can cost balance, never correctness.

    Args:
        expert_ids: int32 or int64 (Bs, K), logical experts 0…E−1, on any device.
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care].
        quotas: int64 (S,), assignments that each slot should take, from `split_batch` on the sum of `counts_by_rank`.
        counts_by_rank: int64 (W, E), counted assignments of each rank.
        rank: of the calling rank, 0…W−1.
        counted: bool (Bs, K) or None. What is False (padding, pruned) is not counted, and still gets a slot.

    Returns:
        Slot ids, (Bs, K) of the dtype of `expert_ids`.

    Raises:
        ConstraintError: shapes or a rank that do not fit; on the CPU also an id without a row, or a row that counts no
            replica.

    Expert 0 has the slots 0 and 2 with quotas 4 and 2. Rank 0 has the first three of its six tokens, rank 1 the rest:

    >>> import torch
    >>> table = torch.tensor([[2, 0, 2], [1, 1, 0]], dtype=torch.int32)
    >>> quotas, counts = torch.tensor([4, 1, 2]), torch.tensor([[3, 0], [3, 1]])
    >>> choose(torch.tensor([[0], [0], [0]]), table, quotas, counts, rank=0).tolist()
    [[0], [0], [0]]
    >>> choose(torch.tensor([[0], [1], [0], [0]]), table, quotas, counts, rank=1).tolist()
    [[0], [1], [2], [2]]
    """
    check_mask(expert_ids, counted)
    _check_counts(eplb_table, counts_by_rank, rank)
    if expert_ids.device.type != "cpu":
        return _choose_anywhere(expert_ids, eplb_table, quotas, counts_by_rank, rank, counted)
    from evenmoe.rules import choose_kernels  # not at the top: importing numba takes 0.3 s

    first = np.asarray(counts_by_rank[:rank], np.int64).sum(axis=0)
    chosen = expert_ids.new_empty(expert_ids.shape)
    experts, table, mask = as_arrays(expert_ids, eplb_table, counted)
    wrong = choose_kernels.choose_by_quota(
        experts, table, np.ascontiguousarray(quotas, np.int64), first, mask, chosen.view(-1).numpy()
    )
    if wrong >= 0:
        raise_at(expert_ids, eplb_table, wrong)
    return chosen


def _choose_anywhere(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: IntArray | torch.Tensor,
    counts_by_rank: IntArray | torch.Tensor,
    rank: int,
    counted: torch.Tensor | None,
) -> torch.Tensor:
    """The same without a loop, for accelerators."""
    import torch

    device = expert_ids.device
    quotas, counts_by_rank = torch.as_tensor(quotas), torch.as_tensor(counts_by_rank)
    experts = expert_ids.long()
    counts = eplb_table[:, :1].long()
    used = torch.arange(eplb_table.shape[1] - 1, device=device) < counts
    ends = quotas.to(device)[eplb_table[:, 1:].long() * used].mul(used).cumsum(1)
    number = number_assignments(experts, counted) + counts_by_rank[:rank].to(device).sum(0)[experts]
    replica = (ends[experts] <= number[..., None]).sum(-1)
    replica = torch.minimum(replica, counts[experts, 0] - 1)
    return eplb_table[experts, 1 + replica].to(expert_ids.dtype)


def _check_counts(eplb_table: torch.Tensor, counts_by_rank: IntArray | torch.Tensor, rank: int) -> None:
    if len(counts_by_rank.shape) != 2 or counts_by_rank.shape[1] != eplb_table.shape[0]:
        raise ConstraintError(
            "counts_by_rank",
            f"an array of shape {tuple(counts_by_rank.shape)}",
            f"must be (ranks, {eplb_table.shape[0]}), one column per row of eplb_table",
            "pass the assignments per logical expert of every rank",
        )
    if not 0 <= rank < counts_by_rank.shape[0]:
        raise ConstraintError(
            "rank", rank, f"must be a row of counts_by_rank, 0 to {counts_by_rank.shape[0] - 1}", "pass your own rank"
        )
