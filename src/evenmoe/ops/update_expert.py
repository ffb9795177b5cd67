"""MoeUpdateExpert: logical expert ids -> physical expert ids, one replica chosen per token (specification §1)."""

from __future__ import annotations

from dataclasses import replace
from operator import index

import torch

from evenmoe.contract.calls import UpdateExpertCall
from evenmoe.contract.limits import UNLIMITED, resolve_limits
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.contract.update_expert import check_update_expert_call
from evenmoe.errors import ConstraintError
from evenmoe.ops.operator import Prepared, check_types, register
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.rules.table import check_ids, check_table

_ASCEND_MODES = (0, 1)  # that the chip has too: the others have numbers only here
_LOCAL_RULES: dict[int, Rule] = {  # by their number, the rules that need nothing of other ranks
    rule.balance_mode: rule for rule in map(RULES.get, RULES) if rule.balance_mode is not None
}


def _check(call: UpdateExpertCall[TensorSpec]) -> None:
    """What the contract says of shapes, dtypes and attributes."""
    if call.balance_mode not in _ASCEND_MODES:
        call = replace(call, balance_mode=0)  # they take what the rank rule takes
    check_update_expert_call(call)


PREPARED = Prepared("update_expert", _check, lambda *_: True)  # a call has neither layout nor plan


def update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int | str = 0,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
    *,
    check_values: bool = True,
    limits: str | None = "relaxed",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map logical expert ids to the physical experts (slots) that this rank uses, and mark entries to prune.

    Local: nothing is communicated. Registered as `torch.ops.evenmoe.update_expert`, so it compiles without a break.

    Args:
        expert_ids: int32 or int64 (Bs, K), logical experts 0…E−1, top-k of each token.
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care]; 1 ≤ count < F.
        local_rank_id: this rank, 0…world_size−1; for the rank and occurrence modes.
        world_size: ranks in the expert-parallel world; for the rank and occurrence modes.
        balance_mode: 0 or "rank": replica rank // ceil(world_size / count). 1 or "token": replica (token row mod
            count). "occurrence": the j-th entry of this call that picks expert e takes replica
            (j + rank + e) mod count, which stays even when few tokens pick an expert.
        expert_scales: float16, bfloat16 or float32 (Bs, K), gate weights; with `pruning_threshold`.
        pruning_threshold: float32 (K,) or (1, K), shares of the token's total weight.
        active_mask: bool (Bs,), False for padding tokens; only with the two above.
        check_values: look at the values too. False saves a pass over ids and table; a wrong value is then undefined.
        limits: "atlas-a3" for exactly the chip's ranges, "relaxed" for its maxima with small worlds allowed, or
            "unlimited".

    Returns:
        balanced_expert_ids: (Bs, K), dtype of expert_ids; slot ids as dispatch understands them.
        balanced_active_mask: bool (Bs, K); entry (i, k) is kept when its scale ≥ pruning_threshold[k] · (sum of the
            token's scales) and the token is active. All True without pruning.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: in the order of specification §1.7.

    Source: the operator's kernel as told in specification §1.3 and §1.5.

    Expert 1 has two replicas, in slots 1 and 7. With 8 ranks the first four use slot 1, the others slot 7:

    >>> table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    >>> ids = torch.tensor([[0, 1]])
    >>> [update_expert(ids, table, rank, 8)[0].tolist() for rank in (3, 4)]
    [[[0, 1]], [[0, 7]]]
    """
    call = UpdateExpertCall(
        expert_ids=expert_ids,
        eplb_table=eplb_table,
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=_resolve_mode(balance_mode),
        expert_scales=expert_scales,
        pruning_threshold=pruning_threshold,
        active_mask=active_mask,
        check_values=check_values,
        limits=resolve_limits(limits),
    )
    return torch.ops.evenmoe.update_expert(**check_types("update_expert", call))


def prepare(
    eplb_table: torch.Tensor,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int | str = 0,
    *,
    check_values: bool = True,
) -> PreparedUpdate:
    """Do once what depends on the table alone, so that a step pays for one lookup.

    Args:
        As `update_expert`. The table is checked here, the ids at each call when `check_values`.

    Returns:
        A callable: `prepared(expert_ids)` is `update_expert(expert_ids, …)[0]`.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: as `update_expert` with limits="unlimited".

    >>> table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    >>> prepare(table, local_rank_id=4, world_size=8)(torch.tensor([[0, 1]])).tolist()
    [[0, 7]]
    """
    call = UpdateExpertCall(
        expert_ids=torch.zeros((1, 1), dtype=torch.int32),  # in place of those to come
        eplb_table=eplb_table,
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=_resolve_mode(balance_mode),
        check_values=check_values,
        limits=UNLIMITED,
    )
    check_types("update_expert", call)
    PREPARED(call)
    # A copy, since the token and occurrence rules read the table later, when its owner may have changed it.
    return PreparedUpdate(
        call.eplb_table.clone(), index(local_rank_id), index(world_size), call.balance_mode, check_values
    )


class PreparedUpdate:
    """An EPLB table turned into the choice of one rank; made by `prepare`."""

    def __init__(
        self, eplb_table: torch.Tensor, local_rank_id: int, world_size: int, balance_mode: int, check_values: bool
    ) -> None:
        if check_values:
            check_table(eplb_table)
        self._choose = _LOCAL_RULES[balance_mode].prepare(eplb_table.contiguous(), -1, local_rank_id, world_size)
        self._num_experts, self._check_values = eplb_table.shape[0], check_values

    def __call__(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Physical ids for logical ones; integers (Bs, K) in, the same dtype and shape out."""
        if self._check_values and not (self._choose.finds_wrong_ids and expert_ids.device.type == "cpu"):
            check_ids(expert_ids, self._num_experts)
        return self._choose(expert_ids)


def _run(call: UpdateExpertCall[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    PREPARED(call)
    expert_ids = call.expert_ids
    prepared = PreparedUpdate(
        call.eplb_table, call.local_rank_id, call.world_size, call.balance_mode, call.check_values
    )
    if call.expert_scales is None or call.pruning_threshold is None:
        mask = torch.ones(expert_ids.shape, dtype=torch.bool, device=expert_ids.device)
    else:
        mask = _keep(call.expert_scales, call.pruning_threshold, call.active_mask)
    return prepared(expert_ids), mask


def _fake(call: UpdateExpertCall[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    ids = call.expert_ids
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape, dtype=torch.bool)


def _keep(scales: torch.Tensor, threshold: torch.Tensor, active_mask: torch.Tensor | None) -> torch.Tensor:
    """§1.5: scale ≥ threshold · total, in float32; the total is summed in ascending k."""
    scales = scales.float()
    total = torch.zeros_like(scales[:, 0])
    for k in range(scales.shape[1]):
        total = total + scales[:, k]
    keep = scales >= threshold.reshape(1, -1) * total[:, None]
    return keep if active_mask is None else keep & active_mask[:, None]


def _resolve_mode(balance_mode: int | str) -> int:
    modes = {rule.name: mode for mode, rule in _LOCAL_RULES.items()} | {mode: mode for mode in _ASCEND_MODES}
    if balance_mode not in tuple(modes):  # a tuple, since what is asked for may be no key at all
        names = [
            f'{mode} or "{rule.name}"' if mode in _ASCEND_MODES else f'"{rule.name}"'
            for mode, rule in _LOCAL_RULES.items()
        ]
        raise ConstraintError(
            "balance_mode",
            repr(balance_mode),
            f"must be {', '.join(names[:-1])}, or {names[-1]}",
            'use evenmoe.ExpertParallel for a rule without a balance_mode, such as "batch"',
        )
    return modes[balance_mode]


register("update_expert", UpdateExpertCall, _run, _fake)
