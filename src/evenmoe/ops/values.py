"""Checks of tensor values, which the contract room (shapes and dtypes) leaves to the operators."""

from __future__ import annotations

import torch

from evenmoe.errors import ConstraintError


def check_physical_ids(expert_ids: torch.Tensor, considered: torch.Tensor, num_ids: int, num_physical: int) -> None:
    """Ids within 0…num_ids−1, and no physical expert twice in one token.

    Args:
        expert_ids: integers (Bs, K).
        considered: bool (Bs, K); padding that a mask takes out may hold anything but an id out of range.
        num_ids: physical and virtual experts.
        num_physical: M; virtual experts (M and above) may repeat.

    Raises:
        ConstraintError: naming the first token and k.
    """
    if expert_ids.numel() == 0:
        return
    low, high = torch.aminmax(expert_ids)
    if low < 0 or high >= num_ids:
        token, k = ((expert_ids < 0) | (expert_ids >= num_ids)).nonzero()[0].tolist()
        raise ConstraintError(
            "expert_ids",
            f"{int(expert_ids[token, k])} for token {token}, k {k}",
            f"must be 0 to {num_ids - 1}",
            "map logical to physical ids with update_expert, and pass the number of slots as num_experts",
        )
    # Everything that may repeat gets a negative id of its own column.
    column = torch.arange(expert_ids.shape[1], device=expert_ids.device)
    compared = torch.where(considered & (expert_ids < num_physical), expert_ids, -1 - column)
    ordered = compared.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if repeated.any():
        token = int(repeated.nonzero()[0])
        raise ConstraintError(
            "expert_ids",
            f"{expert_ids[token].tolist()} for token {token}",
            "must not name one physical expert twice in a token",
            "use slot ids that are unique over the whole EPLB table",
        )
