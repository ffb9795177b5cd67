"""What dispatch and combine check alike, one function for each rule.

The order in which they run is each operator's own: see `dispatch.py` and `combine.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from evenmoe.contract.calls import DistributeCall
from evenmoe.contract.layout import Layout, make_layout
from evenmoe.contract.tensor_spec import TensorSpec, check_absent, check_shape
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError

_INT32_MAX = 2**31 - 1
_GROUP_NAME_ENDS = 128  # HCCL_GROUP_NAME_MAX: a name of so many characters or more is an error

INTEGER_ATTRIBUTES = (
    "ep_world_size",
    "ep_rank_id",
    "moe_expert_num",
    "tp_world_size",
    "tp_rank_id",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "zero_expert_num",
    "copy_expert_num",
    "const_expert_num",
)

Call = DistributeCall[TensorSpec]


class Sizes(NamedTuple):
    """Bs, H and K of a call; known once the tensors have the right numbers of dimensions."""

    tokens: int
    hidden: int
    top_k: int


# The aclnn wrapper ----------------------------------------------------------------------------------------------


def check_group_given(call: Call) -> None:
    if not isinstance(call.group_ep, str) or not call.group_ep:
        raise MissingArgumentError("group_ep", repr(call.group_ep), "must be a name", "pass the name of the EP group")
    if not isinstance(call.group_tp, str):
        raise MissingArgumentError("group_tp", repr(call.group_tp), "must be a name", 'pass "" where there is no TP')


def check_group_lengths(call: Call, error: type[EvenmoeError]) -> None:
    """group_tp is measured even without TP (§2.13, §3.6); the class of the error is the operator's."""
    for argument, name in (("group_ep", call.group_ep), ("group_tp", call.group_tp)):
        if name is not None and len(name) >= _GROUP_NAME_ENDS:
            raise error(
                argument, f"{len(name)} characters long", "must have at most 127 characters", "use a shorter group name"
            )


# Attributes, in the order of §2.13 and §3.6 ----------------------------------------------------------------------


def check_virtual_experts(call: Call) -> None:
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        value = getattr(call, name)
        if value < 0:
            raise ConstraintError(name, value, "must be at least 0", "use 0 for none")
    check_sum_of_experts(call)


def check_sum_of_experts(call: Call) -> None:
    total = call.moe_expert_num + call.virtual_experts
    if total > _INT32_MAX:
        raise ConstraintError(
            "moe_expert_num",
            f"{total} together with zero, copy and const experts",
            f"must be at most {_INT32_MAX}, for ids are int32",
            "use fewer experts",
        )


def check_ep_world_size(call: Call) -> None:
    ep = call.ep_world_size
    call.limits.check("ep_world_size", ep, "ep_world_size", ep, "must be {}", "use {} ranks")


def check_tp_world_size(call: Call) -> None:
    if call.tp_world_size not in (0, 1, 2):
        raise ConstraintError("tp_world_size", call.tp_world_size, "must be 0, 1 or 2", "use 0 for no TP")


def check_ep_rank(call: Call) -> None:
    if not 0 <= call.ep_rank_id < call.ep_world_size:
        last = call.ep_world_size - 1
        raise ConstraintError(
            "ep_rank_id", call.ep_rank_id, f"must be 0 to {last}", "use the rank within the EP group, counted from 0"
        )


def check_tp_rank(call: Call) -> None:
    if call.tp_world_size != 2:
        if call.tp_rank_id != 0:
            raise ConstraintError("tp_rank_id", call.tp_rank_id, "must be 0 without TP", "use 0, or tp_world_size=2")
        return
    if call.tp_rank_id not in (0, 1):
        raise ConstraintError("tp_rank_id", call.tp_rank_id, "must be 0 or 1", "use the rank within the TP group")
    if not call.group_tp:
        raise ConstraintError(
            "group_tp", repr(call.group_tp), "must be a name when tp_world_size is 2", "pass the name of the TP group"
        )
    if call.group_tp == call.group_ep:
        raise ConstraintError(
            "group_tp", repr(call.group_tp), "must not be the EP group's name", "use two communicators"
        )


def check_shard_type(call: Call) -> None:
    if call.expert_shard_type != 0:
        raise ConstraintError(
            "expert_shard_type", call.expert_shard_type, "must be 0, shared experts on the first ranks", "use 0"
        )


def check_shared_expert_num(call: Call) -> None:
    shared = call.shared_expert_num
    call.limits.check("shared_experts", shared, "shared_expert_num", shared, "must be {}", "use {} shared experts")


def check_shared_rank_num(call: Call) -> None:
    if not 0 <= call.shared_expert_rank_num < call.ep_world_size:
        raise ConstraintError(
            "shared_expert_rank_num",
            call.shared_expert_rank_num,
            f"must be 0 to {call.ep_world_size - 1}, so that one of ep_world_size {call.ep_world_size} has MoE experts",
            "use fewer ranks for shared experts",
        )


def check_moe_expert_num(call: Call) -> None:
    experts = call.moe_expert_num
    call.limits.check("physical_experts", experts, "moe_expert_num", experts, "must be {}", "use {} physical experts")


# How the attributes and the tensors' sizes must go together ---------------------------------------------------------


def check_shared_pair(call: Call) -> None:
    shared, ranks = call.shared_expert_num, call.shared_expert_rank_num
    if (shared, ranks) in ((1, 0), (0, 0)):
        return
    if shared == 0 or ranks == 0 or ranks % shared:
        raise ConstraintError(
            "shared_expert_rank_num",
            f"{ranks} with shared_expert_num {shared}",
            "must be a positive multiple of shared_expert_num, or 0 with shared_expert_num 0 or 1",
            "give every shared expert equally many ranks, or none to any",
        )


def check_divisible(call: Call) -> None:
    moe_ranks = call.ep_world_size - call.shared_expert_rank_num
    if call.moe_expert_num % moe_ranks:
        raise ConstraintError(
            "moe_expert_num",
            call.moe_expert_num,
            f"must divide evenly by the {moe_ranks} ranks that hold MoE experts "
            f"(ep_world_size {call.ep_world_size} less shared_expert_rank_num {call.shared_expert_rank_num})",
            f"use a multiple of {moe_ranks}; pad the slots if need be",
        )


def check_experts_per_rank(call: Call) -> None:
    """L·ep; that L is at least 1 follows from the two checks of M before it."""
    product = call.experts_per_rank * call.ep_world_size
    call.limits.check(
        "experts_times_ranks",
        product,
        "moe_expert_num",
        f"{call.moe_expert_num}, {call.experts_per_rank} on each rank, times {call.ep_world_size} ranks = {product}",
        "must keep experts per rank times ep_world_size at {}",
        "use fewer experts per rank",
    )


def check_tp_experts(call: Call) -> None:
    if call.tp_world_size == 2 and call.experts_per_rank != 1:
        raise ConstraintError(
            "tp_world_size",
            f"2 with {call.experts_per_rank} experts per rank",
            "must come with 1 expert per rank",
            "use one physical expert per MoE rank, or no TP",
        )


def check_tp_elastic(call: Call) -> None:
    if call.tp_world_size == 2 and call.elastic_info is not None:
        raise ConstraintError(
            "elastic_info", call.elastic_info, "must be None when tp_world_size is 2", "scale down a world without TP"
        )


def check_tokens(call: Call, sizes: Sizes, argument: str) -> None:
    tokens = sizes.tokens
    call.limits.check(
        "tokens", tokens, argument, f"of {tokens} tokens", "must have {} tokens", "use {} tokens per call and rank"
    )


def check_global_bs(call: Call, sizes: Sizes) -> None:
    total = sizes.tokens * call.ep_world_size
    if call.global_bs == 0 or call.global_bs == total:
        return
    if call.global_bs < total or call.global_bs % call.ep_world_size:
        raise ConstraintError(
            "global_bs",
            call.global_bs,
            f"must be 0 or a multiple of ep_world_size {call.ep_world_size} that is at least Bs·ep = {total}",
            "pass ep_world_size times the tokens of the fullest rank",
        )
    if call.x_active_mask is not None:
        raise ConstraintError(
            "x_active_mask",
            f"{call.x_active_mask} with global_bs {call.global_bs}",
            f"must be None unless every rank has the same Bs, so global_bs 0 or {total}",
            "pad every rank to the same Bs and mask the padding",
        )


def check_hidden(call: Call, sizes: Sizes, argument: str) -> None:
    hidden = sizes.hidden
    call.limits.check(
        "hidden", hidden, argument, f"of width {hidden}", "must have {} columns", "use a hidden size of {}"
    )


def check_top_k(call: Call, sizes: Sizes) -> None:
    top_k, experts = sizes.top_k, call.moe_expert_num + call.virtual_experts
    call.limits.check(
        "top_k", top_k, "expert_ids", f"of {top_k} columns", "must have {} columns", "use {} experts per token"
    )
    if top_k > experts:
        raise ConstraintError(
            "expert_ids",
            f"of {top_k} columns",
            f"must have at most {experts} columns, one per expert",
            "route a token to each expert once at most",
        )


def check_mask_shape(call: Call, sizes: Sizes) -> None:
    mask = call.x_active_mask
    if isinstance(mask, TensorSpec):
        by_token = len(mask.shape) == 1
        shape = (sizes.tokens,) if by_token else (sizes.tokens, sizes.top_k)
        check_shape("x_active_mask", mask, shape, "one entry per token" if by_token else "one entry per token and k")


def check_elastic_shape(call: Call) -> None:
    ep = call.ep_world_size
    check_shape("elastic_info", call.elastic_info, (4 + 2 * ep,), f"four numbers and two tables of {ep} ranks")


def layout_of(call: Call, sizes: Sizes) -> Layout:
    """The layout of a call whose attributes have been checked."""
    return make_layout(
        ep=call.ep_world_size,
        rank=call.ep_rank_id,
        num_experts=call.moe_expert_num,
        num_tokens=sizes.tokens,
        hidden=sizes.hidden,
        top_k=sizes.top_k,
        tp=call.tp_world_size,
        tp_rank=call.tp_rank_id,
        shared_experts=call.shared_experts,
        shared_ranks=call.shared_expert_rank_num,
        global_bs=call.global_bs,
        elastic=call.elastic_info is not None,
    )


def check_performance_info(call: Call) -> None:
    check_absent("performance_info", call.performance_info, "pass None, only Atlas A2 fills it")


def check_buffer(call: Call, layout: Layout, full_mesh_v2: bool = False) -> None:
    """Room for two halves of every rank's tokens in HCCL's buffer (§2.2); a token there is 16-bit."""
    if call.hccl_buffer_bytes is None:
        return
    aligned = _align(2 * layout.hidden, 32) + 44
    # fullmesh_v2 carries 480 bytes in each block of 512.
    sent = -(-aligned // 480) * 512 if full_mesh_v2 else _align(aligned, 512)
    returned = _align(2 * layout.hidden, 512)
    per_token = sent * layout.ep * layout.experts_per_rank + returned * (layout.top_k + layout.shared_experts)
    needs = {"EP": 2 * layout.max_bs * per_token}
    if layout.tp == 2:
        needs["TP"] = 2 * layout.capacity * (sent + returned)
    for group, need in needs.items():
        if need > call.hccl_buffer_bytes:
            raise ConstraintError(
                "hccl_buffer_bytes",
                call.hccl_buffer_bytes,
                f"must be at least {need} for the {group} group",
                f"use HCCL_BUFFSIZE {-(-need // 2**20)} (MB) or more",
            )


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
