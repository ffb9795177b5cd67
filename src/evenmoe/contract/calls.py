"""The calls of the operators, one frozen dataclass each: what they are called with, tensors and attributes.

The same class holds an operator's tensors (`DispatchCall[torch.Tensor]`), and their shapes and dtypes alone
(`DispatchCall[TensorSpec]`), which is what the contract checks. A required tensor may be missing before that: None.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from evenmoe.contract.limits import ATLAS_A3, Limits
from evenmoe.contract.tensor_spec import ALLOCATED, Allocated
from evenmoe.errors import as_integer

Tensor = TypeVar("Tensor")
Input: TypeAlias = Tensor | None
Output: TypeAlias = Tensor | Allocated | None

_Call = TypeVar("_Call", bound="_Fields")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """What a call of any operator has.

    Attributes:
        check_values: whether the operator looks at the tensors' values too; the contract does not.
        limits: `Limits`.
    """

    check_values: bool = True
    limits: Limits = ATLAS_A3


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateExpertCall(_Fields, Generic[Tensor]):
    """Everything that update expert is called with.

    Attributes:
        expert_ids: int32 or int64 (Bs, K), logical experts.
        eplb_table: int32 (E, F).
        local_rank_id, world_size: int, looked at under balance_mode 0 only.
        balance_mode: int, 0 by rank, 1 by token.
        expert_scales: float16, bfloat16 or float32 (Bs, K), or None.
        pruning_threshold: float32 (K,) or (1, K), or None; with expert_scales or not at all.
        active_mask: bool (Bs,), or None; only with the two before.
        balanced_expert_ids: like expert_ids; `ALLOCATED` when the operator allocates it. None is a null pointer.
        balanced_active_mask: bool (Bs, K), or as before. The older operator has none.
        generation: "update_expert", or "eplb_update_expert" for the older operator: int32 ids, balance_mode 0, no
            pruning, and fewer experts and ranks.
    """

    expert_ids: Tensor
    eplb_table: Tensor
    local_rank_id: int = -1
    world_size: int = -1
    balance_mode: int = 0
    expert_scales: Input[Tensor] = None
    pruning_threshold: Input[Tensor] = None
    active_mask: Input[Tensor] = None
    balanced_expert_ids: Output[Tensor] = ALLOCATED
    balanced_active_mask: Output[Tensor] = ALLOCATED
    generation: Literal["update_expert", "eplb_update_expert"] = "update_expert"

    @property
    def old(self) -> bool:
        return self.generation == "eplb_update_expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributeCall(_Fields, Generic[Tensor]):
    """What every call of dispatch and combine has (specification §2.2).

    Attributes:
        expert_ids: int32 (Bs, K).
        group_ep, group_tp: names of 1…127 characters; group_tp may be "" without TP, and since 2026 None.
        ep_world_size, ep_rank_id, tp_world_size, tp_rank_id: int. tp_world_size 0 and 1 both mean no TP.
        moe_expert_num: int, physical MoE experts over all ranks.
        x_active_mask: bool (Bs,) or (Bs, K), or None.
        elastic_info: int32 (4 + 2·ep,), or None.
        performance_info: only None.
        expert_shard_type: only 0.
        shared_expert_num, shared_expert_rank_num: int; the default 1 and 0 together mean none.
        global_bs: int, tokens of the fullest rank times ep, or 0 when every rank has Bs.
        comm_alg: "", "fullmesh_v1", "fullmesh_v2" or "hierarchy"; None is taken as "".
        zero_expert_num, copy_expert_num, const_expert_num: int, virtual experts with the ids after moe_expert_num.
        hccl_buffer_bytes: int, size of each group's communication buffer, or None: do not check it.
    """

    expert_ids: Tensor
    group_ep: str | None
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    x_active_mask: Input[Tensor] = None
    elastic_info: Input[Tensor] = None
    performance_info: Input[Tensor] = None
    group_tp: str | None = ""
    tp_world_size: int = 0
    tp_rank_id: int = 0
    expert_shard_type: int = 0
    shared_expert_num: int = 1
    shared_expert_rank_num: int = 0
    global_bs: int = 0
    comm_alg: str | None = ""
    zero_expert_num: int = 0
    copy_expert_num: int = 0
    const_expert_num: int = 0
    hccl_buffer_bytes: int | None = None

    @property
    def shared_experts(self) -> int:
        """Sn: the default pair (1, 0) is no shared expert at all (§0)."""
        return self.shared_expert_num if self.shared_expert_rank_num else 0

    @property
    def experts_per_rank(self) -> int:
        """L."""
        return self.moe_expert_num // (self.ep_world_size - self.shared_expert_rank_num)

    @property
    def virtual_experts(self) -> int:
        return self.zero_expert_num + self.copy_expert_num + self.const_expert_num


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchCall(DistributeCall[Tensor]):
    """Everything that dispatch is called with; the fields of `DistributeCall`, and these.

    Attributes:
        x: float16 or bfloat16 (Bs, H).
        scales: float32 (Sn + M, H), only under quant_mode 2, or None.
        expert_scales: float32 (Bs, K), gate weights, or None.
        quant_mode: int, 0 or 2.
        expert_token_nums_type: int, 0 for prefix sums, 1 for counts.
        expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums, ep_recv_counts, tp_recv_counts,
            expand_scales: the outputs; `ALLOCATED` when the operator allocates them. None is a null pointer.
    """

    x: Tensor
    scales: Input[Tensor] = None
    expert_scales: Input[Tensor] = None
    quant_mode: int = 0
    expert_token_nums_type: int = 1
    expand_x: Output[Tensor] = ALLOCATED
    dynamic_scales: Output[Tensor] = ALLOCATED
    assist_info_for_combine: Output[Tensor] = ALLOCATED
    expert_token_nums: Output[Tensor] = ALLOCATED
    ep_recv_counts: Output[Tensor] = ALLOCATED
    tp_recv_counts: Output[Tensor] = ALLOCATED
    expand_scales: Output[Tensor] = ALLOCATED

    @property
    def sends_expert_scales(self) -> bool:
        """Whether each row's weight travels with it (§2.3). A tensor without elements counts as none on the chip."""
        if self.expert_scales is None or self.limits.expand_scales == "unwritten" or self.tp_world_size == 2:
            return False
        given: Any = self.expert_scales
        expected: Any = self.expert_ids
        return 0 not in given.shape or given.shape == expected.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineCall(DistributeCall[Tensor]):
    """Everything that combine is called with; the fields of `DistributeCall`, and these.

    Attributes:
        expand_x: float16 or bfloat16 (at least A·tp, H), the experts' outputs in dispatch's row order.
        assist_info_for_combine: int32 (at least 128·A,), dispatch's.
        ep_send_counts: int32 (at least ep·L·tp,), dispatch's ep_recv_counts.
        expert_scales: float32 (Bs, K), gate weights.
        tp_send_counts: int32 (tp,), dispatch's tp_recv_counts; without TP also None and of any shape, but in 2025.
        activation_scale, weight_scale, group_list: only None.
        expand_scales: float32, not used, or None; dispatch's must be given with comm_alg "hierarchy".
        shared_expert_x: (Bs, H) or (a, b, H) with a·b = Bs, or None; only without ranks of shared experts.
        ori_x: (Bs, H), the tokens; needed when there are copy or const experts.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: (const_expert_num, H); needed when there are any.
            The first two both (const_expert_num,) as in November 2025 are plain factors (§3.4).
        dispatch_number: int64 (2,), which exchange of the two groups the dispatch was, or None: it is not known.
        out_dtype, group_list_type: not examined.
        comm_quant_mode: int, 0, or 2 for rows that travel as int8.
        x_out: (Bs, H), the output; `ALLOCATED` when the operator allocates it. None is a null pointer.
            The tensors without a dtype here all have expand_x's.
    """

    expand_x: Tensor
    assist_info_for_combine: Tensor
    ep_send_counts: Tensor
    expert_scales: Tensor
    tp_send_counts: Input[Tensor] = None
    activation_scale: Input[Tensor] = None
    weight_scale: Input[Tensor] = None
    group_list: Input[Tensor] = None
    expand_scales: Input[Tensor] = None
    shared_expert_x: Input[Tensor] = None
    ori_x: Input[Tensor] = None
    const_expert_alpha_1: Input[Tensor] = None
    const_expert_alpha_2: Input[Tensor] = None
    const_expert_v: Input[Tensor] = None
    dispatch_number: Input[Tensor] = None
    out_dtype: int = 0
    comm_quant_mode: int = 0
    group_list_type: int = 0
    x_out: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRmsNormCall(CombineCall[Tensor]):
    """Everything that combine_add_rms_norm is called with; the fields of `CombineCall`, and these (§4).

    Attributes:
        expand_x: bfloat16 on Atlas A3.
        residual_x: (Bs, 1, H), expand_x's dtype.
        gamma: (H,), expand_x's dtype. Also (Bs, 1, H), which the operator's first page shows; the rows are then equal.
        norm_eps: float, not examined.
        y_out, x_out: (Bs, 1, H), expand_x's dtype.
        rstd_out: float32 (Bs, 1, 1).
    """

    residual_x: Tensor
    gamma: Tensor
    norm_eps: float = 1e-6
    y_out: Output[Tensor] = ALLOCATED
    rstd_out: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchV1Call(DispatchCall[Tensor]):
    """Everything that the first version of dispatch is called with: fields of `DispatchCall`, and this one (§2.17).

    Attributes:
        expand_idx: the output in place of assist_info_for_combine, int32 (Bs·K,).
        x_active_mask: not looked at. shared_expert_num: 1.
    """

    expand_idx: Output[Tensor] = ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineV1Call(CombineCall[Tensor]):
    """Everything that the first version of combine is called with: fields of `CombineCall`, and this one (§3.8).

    Attributes:
        expand_idx: int32 (Bs·K,), dispatch's, in place of assist_info_for_combine.
        x_active_mask: not looked at. shared_expert_num: 1. shared_expert_x: only None.
    """

    expand_idx: Tensor
    assist_info_for_combine: Any = None


def with_integers(call: _Call, names: tuple[str, ...]) -> _Call:
    """The same call, NumPy's whole numbers as Python's.

    Raises:
        ConstraintError: an attribute that is no whole number, None included.

    >>> with_integers(UpdateExpertCall(expert_ids=None, eplb_table=None, world_size=True), ("world_size",)).world_size
    1
    """
    given = {name: getattr(call, name) for name in names}
    converted = {name: as_integer(name, value) for name, value in given.items() if type(value) is not int}
    return replace(call, **converted) if converted else call
