"""How the attributes of dispatch and combine and the sizes of their tensors must go together, one check for each."""

from __future__ import annotations

from evenmoe.contract.distribute import DistributeCall
from evenmoe.contract.layout import make_layout
from evenmoe.contract.tensor_spec import TensorSpec, check_absent, check_shape
from evenmoe.errors import ConstraintError


def check_shared_pair(call: DistributeCall) -> None:
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


def check_divisible(call: DistributeCall) -> None:
    moe_ranks = call.ep_world_size - call.shared_expert_rank_num
    if call.moe_expert_num % moe_ranks:
        raise ConstraintError(
            "moe_expert_num",
            call.moe_expert_num,
            f"must divide evenly by the {moe_ranks} ranks that hold MoE experts "
            f"(ep_world_size {call.ep_world_size} less shared_expert_rank_num {call.shared_expert_rank_num})",
            f"use a multiple of {moe_ranks}; pad the slots if need be",
        )


def check_experts_per_rank(call: DistributeCall) -> None:
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


def check_tp_experts(call: DistributeCall) -> None:
    if call.tp_world_size == 2 and call.experts_per_rank != 1:
        raise ConstraintError(
            "tp_world_size",
            f"2 with {call.experts_per_rank} experts per rank",
            "must come with 1 expert per rank",
            "use one physical expert per MoE rank, or no TP",
        )


def check_tp_elastic(call: DistributeCall) -> None:
    if call.tp_world_size == 2 and call.elastic_info is not None:
        raise ConstraintError(
            "elastic_info", call.elastic_info, "must be None when tp_world_size is 2", "scale down a world without TP"
        )


def check_tokens(call: DistributeCall, argument: str) -> None:
    tokens = call.tokens
    call.limits.check(
        "tokens", tokens, argument, f"of {tokens} tokens", "must have {} tokens", "use {} tokens per call and rank"
    )


def check_global_bs(call: DistributeCall) -> None:
    total = call.tokens * call.ep_world_size
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


def check_hidden(call: DistributeCall, argument: str) -> None:
    hidden = call.hidden
    call.limits.check(
        "hidden", hidden, argument, f"of width {hidden}", "must have {} columns", "use a hidden size of {}"
    )


def check_top_k(call: DistributeCall) -> None:
    top_k, experts = call.top_k, call.moe_expert_num + call.virtual_experts
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


def check_mask_shape(call: DistributeCall) -> None:
    mask = call.x_active_mask
    if isinstance(mask, TensorSpec):
        by_token = len(mask.shape) == 1
        shape = (call.tokens,) if by_token else (call.tokens, call.top_k)
        check_shape("x_active_mask", mask, shape, "one entry per token" if by_token else "one entry per token and k")


def check_elastic_shape(call: DistributeCall) -> None:
    ep = call.ep_world_size
    check_shape("elastic_info", call.elastic_info, (4 + 2 * ep,), f"four numbers and two tables of {ep} ranks")


def derive_layout(call: DistributeCall) -> None:
    """Not a check: from here on the attributes are sound, and lengths follow from them."""
    call.layout = make_layout(
        ep=call.ep_world_size,
        rank=call.ep_rank_id,
        num_experts=call.moe_expert_num,
        num_tokens=call.tokens,
        hidden=call.hidden,
        top_k=call.top_k,
        tp=call.tp_world_size,
        tp_rank=call.tp_rank_id,
        shared_experts=call.shared_experts,
        shared_ranks=call.shared_expert_rank_num,
        global_bs=call.global_bs,
        elastic=call.elastic_info is not None,
    )


def check_performance_info(call: DistributeCall) -> None:
    check_absent("performance_info", call.performance_info, "pass None, only Atlas A2 fills it")


def check_buffer(call: DistributeCall, full_mesh_v2: bool = False) -> None:
    """Room for two halves of every rank's tokens in HCCL's buffer (§2.2); a token there is 16-bit."""
    if call.hccl_buffer_bytes is None:
        return
    layout = call.layout
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
