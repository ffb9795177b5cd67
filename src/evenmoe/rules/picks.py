"""Picks: the (token, k) entries of a rank's routing in row-major order, which the counting rules number per expert."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.errors import ConstraintError


def number_picks(expert_ids: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """For each pick, how many counted picks of the same expert come before it.

    Args:
        expert_ids: integers (Bs, K) on any device.
        counted: bool (Bs, K), or None when every pick counts.

    Returns:
        int64 (Bs, K).

    Vectorised: a stable sort brings each expert's picks together in their order.

    >>> number_picks(torch.tensor([[4, 2], [4, 4]]), None).tolist()
    [[0, 0], [1, 2]]
    """
    experts = expert_ids.reshape(-1)
    in_order, by_expert = torch.sort(experts, stable=True)
    counts = torch.ones_like(in_order, dtype=torch.int64) if counted is None else counted.reshape(-1)[by_expert].long()
    before = counts.cumsum(0) - counts
    starts = torch.searchsorted(in_order, in_order)  # where the run of equal experts begins
    numbers = torch.empty_like(before)
    numbers[by_expert] = before - before[starts]
    return numbers.view(expert_ids.shape)


def as_arrays(
    expert_ids: torch.Tensor, eplb_table: torch.Tensor, counted: torch.Tensor | None
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """What the compiled loops take, without a copy for contiguous CPU tensors; no mask is an empty one."""
    mask = np.empty(0, np.bool_) if counted is None else counted.contiguous().view(-1).numpy()
    return expert_ids.contiguous().view(-1).numpy(), eplb_table.contiguous().numpy(), mask


def check_mask(expert_ids: torch.Tensor, counted: torch.Tensor | None) -> None:
    """Raises ConstraintError unless `counted` is None or bool of the shape of `expert_ids`."""
    if counted is not None and (counted.shape != expert_ids.shape or counted.dtype != torch.bool):
        raise ConstraintError(
            "counted",
            f"of dtype {counted.dtype} and shape {tuple(counted.shape)}",
            f"must be bool and have the shape of expert_ids, {tuple(expert_ids.shape)}",
            "pass one entry per (token, k), or None",
        )


def refuse_pick(expert_ids: torch.Tensor, eplb_table: torch.Tensor, pick: int) -> None:
    """Raise the ConstraintError for the pick that a compiled loop stopped at."""
    expert = int(expert_ids.reshape(-1)[pick])
    if 0 <= expert < eplb_table.shape[0]:
        raise ConstraintError(
            "eplb_table",
            f"{eplb_table[expert].tolist()} in row {expert}",
            f"must count 1 to {eplb_table.shape[1] - 1} replicas, then name their slots",
            "build it with Placement.eplb_table",
        )
    raise ConstraintError(
        "expert_ids",
        f"{expert} at pick {pick}",
        f"must be a row of eplb_table, 0 to {eplb_table.shape[0] - 1}",
        "route to the model's logical experts",
    )
