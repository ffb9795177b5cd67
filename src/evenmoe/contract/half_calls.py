"""The calls of the operators that are divided into setup and teardown (specification §14), one frozen dataclass each.

As in `calls`, the same class holds tensors, or their shapes and dtypes alone. A required tensor may be missing before
the checks: None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from evenmoe.contract.calls import Input, Output, Tensor
from evenmoe.contract.limits import ATLAS_A3, Limits
from evenmoe.contract.tensor_spec import ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfCall(Generic[Tensor]):
    """What every call of a setup and of a teardown has.

    Attributes:
        expert_ids: int32 (Bs, K).
        group_ep: a name of 1…127 characters.
        ep_world_size, ep_rank_id, moe_expert_num: int, ranks, this rank, physical experts over all ranks.
        expert_shard_type: only 0.
        shared_expert_num, shared_expert_rank_num: int; 1 and 0 together, or 0 and 0, mean none.
        global_bs: int, tokens of the fullest rank times ep, or 0 when every rank has Bs.
        comm_type: only 2, remote memory access.
        comm_alg: only ""; None is taken as "".
        check_values: whether the operator looks at the tensors' values too; the contract does not.
        limits: `Limits`; all but "relaxed" and "unlimited" are those of Ascend 950 here.

    >>> ranks = dict(group_ep="ep", ep_world_size=2, ep_rank_id=0, moe_expert_num=32)
    >>> DispatchSetupCall(x="tokens", expert_ids="experts", **ranks).of_the_chip
    True
    """

    expert_ids: Tensor
    group_ep: str | None
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    expert_shard_type: int = 0
    shared_expert_num: int = 1
    shared_expert_rank_num: int = 0
    global_bs: int = 0
    comm_type: int = 0
    comm_alg: str | None = ""
    check_values: bool = True
    limits: Limits = ATLAS_A3

    @property
    def of_the_chip(self) -> bool:
        """Whether the sizes must be those that the chip takes."""
        return self.limits.name not in ("relaxed", "unlimited")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSetupCall(HalfCall[Tensor]):
    """Everything that the setup of dispatch is called with; the fields of `HalfCall`, and these.

    Attributes:
        x: float16 or bfloat16 (Bs, H). scales: float32 (Sn + M, H), only under quant_mode 2, or None.
        x_active_mask: bool (Bs,), or None.
        quant_mode: int, 0 or 2.
        y, expand_idx, comm_cmd_info: the outputs; `ALLOCATED` when the operator allocates them. None is a null pointer.
    """

    x: Tensor
    scales: Input[Tensor] = None
    x_active_mask: Input[Tensor] = None
    quant_mode: int = 0
    y: Output[Tensor] = ALLOCATED
    expand_idx: Output[Tensor] = ALLOCATED
    comm_cmd_info: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchTeardownCall(HalfCall[Tensor]):
    """Everything that the teardown of dispatch is called with; the fields of `HalfCall`, and these.

    Attributes:
        x: that of the setup. y, comm_cmd_info: what the setup gave.
        quant_mode: int, that of the setup. expert_token_nums_type: only 1.
        expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums: the outputs, as in `DispatchSetupCall`.
    """

    x: Tensor
    y: Tensor
    comm_cmd_info: Tensor
    quant_mode: int = 0
    expert_token_nums_type: int = 1
    expand_x: Output[Tensor] = ALLOCATED
    dynamic_scales: Output[Tensor] = ALLOCATED
    assist_info_for_combine: Output[Tensor] = ALLOCATED
    expert_token_nums: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSetupCall(HalfCall[Tensor]):
    """Everything that the setup of combine is called with; the fields of `HalfCall`, and these.

    Attributes:
        expand_x: float16 or bfloat16 (at least A, H), the experts' outputs in dispatch's row order.
        assist_info_for_combine: int32 (128·A,), what the teardown of dispatch gave.
        comm_quant_mode: only 0.
        quant_expand_x, comm_cmd_info: the outputs, as in `DispatchSetupCall`.
    """

    expand_x: Tensor
    assist_info_for_combine: Tensor
    comm_quant_mode: int = 0
    quant_expand_x: Output[Tensor] = ALLOCATED
    comm_cmd_info: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineTeardownCall(HalfCall[Tensor]):
    """Everything that the teardown of combine is called with; the fields of `HalfCall`, and these.

    Attributes:
        expand_x: that of the setup. quant_expand_x, comm_cmd_info: what the setup gave.
        expand_idx: int32 (Bs·K,), what the setup of dispatch gave.
        expert_scales: float32 (Bs, K), gate weights.
        x_active_mask: bool (Bs,), or None. shared_expert_x: only None.
        comm_quant_mode: only 0.
        x_out: (Bs, H), the output, as in `DispatchSetupCall`.
    """

    expand_x: Tensor
    quant_expand_x: Tensor
    expand_idx: Tensor
    expert_scales: Tensor
    comm_cmd_info: Tensor
    x_active_mask: Input[Tensor] = None
    shared_expert_x: Input[Tensor] = None
    comm_quant_mode: int = 0
    x_out: Output[Tensor] = ALLOCATED
