"""An EPLB table, the assignments that are looked up in it, and the checks of both.

An assignment is one (token, k) entry of a rank's routing; the rules that count go through them in row-major order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, UnsupportedTypeError

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]


def check_table(table: torch.Tensor) -> None:
    """Raise ConstraintError unless counts are within the columns, and the counted columns hold no negative slot."""
    import torch

    columns = table.shape[1]
    counts = table[:, 0]
    wrong = (counts < 1) | (counts >= columns)
    if wrong.any():
        expert = int(wrong.nonzero()[0])
        raise ConstraintError(
            "eplb_table",
            f"{int(counts[expert])} in row {expert}, column 0",
            f"must count 1 to {columns - 1} replicas of each expert, since it has {columns} columns",
            "give every logical expert a slot, or the table more columns",
        )
    column = torch.arange(1, columns, device=table.device)
    wrong = (table[:, 1:] < 0) & (column[None, :] <= counts[:, None])
    if wrong.any():
        expert, replica = wrong.nonzero()[0].tolist()
        raise ConstraintError(
            "eplb_table",
            f"{int(table[expert, 1 + replica])} in row {expert}, column {1 + replica}",
            "must hold slot ids, 0 or more, in the counted columns",
            "build it with Placement.eplb_table",
        )


def check_table_of_slots(table: object, num_slots: int) -> None:
    """Raise unless `table` is an EPLB table that names only slots below `num_slots`, each at most once."""
    import torch

    if not isinstance(table, torch.Tensor):
        raise UnsupportedTypeError(
            "eplb_table", f"a {type(table).__name__}", "must be a torch.Tensor", "use torch.tensor"
        )
    shape = table.shape
    if table.dtype != torch.int32 or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise UnsupportedTypeError(
            "eplb_table",
            f"{table.dtype} of shape {tuple(shape)}",
            "must be torch.int32 (experts, 1 + the most replicas)",
            "use Placement.eplb_table(layer)",
        )
    check_table(table)
    experts, slots = counted_entries(table)
    if slots.max() >= num_slots:
        entry = int(np.argmax(slots >= num_slots))
        raise ConstraintError(
            "eplb_table",
            f"{slots[entry]} in row {experts[entry]}",
            f"must hold slot ids below num_slots, {num_slots}",
            "pass the number of slots over all ranks",
        )
    by_slot = np.argsort(slots, kind="stable")
    repeated = np.nonzero(np.diff(slots[by_slot]) == 0)[0]
    if repeated.size:
        first, second = by_slot[repeated[0]], by_slot[repeated[0] + 1]
        raise ConstraintError(
            "eplb_table",
            f"{slots[first]} in row {experts[first]} and row {experts[second]}",
            "must name each slot once, since a slot holds one expert",
            "use the slot ids of a Placement",
        )


def counted_entries(table: torch.Tensor) -> tuple[IntArray, IntArray]:
    """The part of a table that means something: the expert and the slot of every counted entry, in table order."""
    rows = table.cpu().numpy()
    counted = np.arange(1, rows.shape[1]) <= rows[:, :1]
    return np.nonzero(counted)[0], rows[:, 1:][counted].astype(np.int64)


def check_ids(expert_ids: torch.Tensor, num_experts: int) -> None:
    """Raise ConstraintError for the first id that is no row of a table of `num_experts` rows."""
    if expert_ids.numel() == 0:
        return
    low, high = (bound.item() for bound in expert_ids.aminmax())
    if low < 0 or high >= num_experts:
        token, k = ((expert_ids < 0) | (expert_ids >= num_experts)).nonzero()[0].tolist()
        raise ConstraintError(
            "expert_ids",
            f"{int(expert_ids[token, k])} for token {token}, k {k}",
            f"must be a row of eplb_table, 0 to {num_experts - 1}",
            "route to the model's logical experts, or pass the whole table",
        )


def check_mask(expert_ids: torch.Tensor, counted: torch.Tensor | None) -> None:
    """Raise ConstraintError unless `counted` is None or bool of the shape of `expert_ids`."""
    if counted is None:
        return
    import torch

    if counted.shape != expert_ids.shape or counted.dtype != torch.bool:
        raise ConstraintError(
            "counted",
            f"of dtype {counted.dtype} and shape {tuple(counted.shape)}",
            f"must be bool and have the shape of expert_ids, {tuple(expert_ids.shape)}",
            "pass one entry per (token, k), or None",
        )


def replicas_at(table: torch.Tensor, replica: torch.Tensor) -> torch.Tensor:
    """The slots of the replicas with these numbers, from 0: (E, n) for `replica` (E, n)."""
    return table.gather(1, 1 + replica.long())


def number_assignments(expert_ids: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """For each assignment, how many counted ones of the same expert come before it.

    Args:
        expert_ids: integers (Bs, K) on any device.
        counted: bool (Bs, K), or None when every assignment counts.

    Returns:
        int64 (Bs, K).

    Vectorized: a stable sort brings each expert's assignments together in their order.

    >>> import torch
    >>> number_assignments(torch.tensor([[4, 2], [4, 4]]), None).tolist()
    [[0, 0], [1, 2]]
    """
    import torch

    in_order, by_expert = torch.sort(expert_ids.reshape(-1), stable=True)
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


def raise_at(expert_ids: torch.Tensor, eplb_table: torch.Tensor, position: int) -> None:
    """Raise the ConstraintError for the assignment that a compiled loop stopped at."""
    expert = int(expert_ids.reshape(-1)[position])
    if 0 <= expert < eplb_table.shape[0]:
        raise ConstraintError(
            "eplb_table",
            f"{eplb_table[expert].tolist()} in row {expert}",
            f"must count 1 to {eplb_table.shape[1] - 1} replicas, then name their slots",
            "build it with Placement.eplb_table",
        )
    raise ConstraintError(
        "expert_ids",
        f"{expert} at assignment {position}",
        f"must be a row of eplb_table, 0 to {eplb_table.shape[0] - 1}",
        "route to the model's logical experts",
    )
