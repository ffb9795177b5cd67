"""The `batch` rule: the tokens of an expert over all ranks are one line, cut at the quotas of its replicas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.errors import ConstraintError
from evenmoe.rules.picks import as_arrays, check_mask, number_picks, refuse_pick


def choose(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: npt.NDArray[np.int64] | torch.Tensor,
    counts_by_rank: npt.NDArray[np.int64] | torch.Tensor,
    rank: int,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's picks of expert e are an interval of all picks of e; each goes to the replica whose quota covers it.

    The interval begins after the picks of the lower ranks. The replicas' quotas follow one another in the order of
    the table row. Picks beyond the last quota go to the last replica, so every pick gets a replica of its expert even
    if ranks disagree about quotas or counts: that can cost balance, never correctness.

    Args:
        expert_ids: int32 or int64 (Bs, K), logical experts 0…E−1, on any device.
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care].
        quotas: int64 (S,), picks that each slot should take, from `split_batch` on the sum of `counts_by_rank`.
        counts_by_rank: int64 (W, E), counted picks of each rank.
        rank: of the calling rank, 0…W−1.
        counted: bool (Bs, K) or None. Picks that are False (padding, pruned) are not counted; they still get a slot.

    Returns:
        Slot ids, (Bs, K) of the dtype of `expert_ids`.

    Raises:
        ConstraintError: shapes or a rank that do not fit; on the CPU also an id without a row, or a row that counts no
            replica.

    Expert 0 has the slots 0 and 2 with quotas 4 and 2. Rank 0 has the first three of its six picks, rank 1 the rest:

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
        return _choose_anywhere(
            expert_ids, eplb_table, torch.as_tensor(quotas), torch.as_tensor(counts_by_rank), rank, counted
        )
    from evenmoe.rules import choose_kernels  # not at the top: importing numba takes 0.3 s

    first = np.asarray(counts_by_rank[:rank], np.int64).sum(axis=0)
    chosen = torch.empty(expert_ids.shape, dtype=expert_ids.dtype)
    experts, table, mask = as_arrays(expert_ids, eplb_table, counted)
    wrong = choose_kernels.choose_by_quota(
        experts, table, np.ascontiguousarray(quotas, np.int64), first, mask, chosen.view(-1).numpy()
    )
    if wrong >= 0:
        refuse_pick(expert_ids, eplb_table, wrong)
    return chosen


def _choose_anywhere(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    quotas: torch.Tensor,
    counts_by_rank: torch.Tensor,
    rank: int,
    counted: torch.Tensor | None,
) -> torch.Tensor:
    """The same without a loop, for accelerators."""
    device = expert_ids.device
    experts = expert_ids.long()
    counts = eplb_table[:, :1].long()
    used = torch.arange(eplb_table.shape[1] - 1, device=device) < counts
    ends = quotas.to(device)[eplb_table[:, 1:].long() * used].mul(used).cumsum(1)
    number = number_picks(experts, counted) + counts_by_rank[:rank].to(device).sum(0)[experts]
    replica = (ends[experts] <= number[..., None]).sum(-1)
    replica = torch.minimum(replica, counts[experts, 0] - 1)
    return eplb_table[experts, 1 + replica].to(expert_ids.dtype)


def _check_counts(eplb_table: torch.Tensor, counts_by_rank: npt.NDArray[np.int64] | torch.Tensor, rank: int) -> None:
    if len(counts_by_rank.shape) != 2 or counts_by_rank.shape[1] != eplb_table.shape[0]:
        raise ConstraintError(
            "counts_by_rank",
            f"an array of shape {tuple(counts_by_rank.shape)}",
            f"must be (ranks, {eplb_table.shape[0]}), one column per row of eplb_table",
            "pass the picks per logical expert of every rank",
        )
    if not 0 <= rank < counts_by_rank.shape[0]:
        raise ConstraintError(
            "rank", rank, f"must be a row of counts_by_rank, 0 to {counts_by_rank.shape[0] - 1}", "pass your own rank"
        )
