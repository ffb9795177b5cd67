"""What dispatch and combine check alike, one function for each rule.

The order in which they run is each operator's own: see `dispatch.py` and `combine.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from evenmoe.contract.calls import DispatchCall, DistributeCall
from evenmoe.contract.layout import Layout, make_layout
from evenmoe.contract.tensor_spec import TensorSpec, check_absent, check_shape
from evenmoe.errors import EvenmoeError, MissingArgumentError, require

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


def tp_examined(call: Call) -> bool:
    """Whether the arguments for tensor-parallel peers are looked at: where there are peers, and in 2025 always."""
    return call.tp_world_size == 2 or not call.limits.tp_arguments_reserved


def check_group_given(call: Call) -> None:
    if not isinstance(call.group_ep, str) or not call.group_ep:
        raise MissingArgumentError("group_ep", repr(call.group_ep), "must be a name", "pass the name of the EP group")
    if not isinstance(call.group_tp, str) and not (call.group_tp is None and not tp_examined(call)):
        raise MissingArgumentError("group_tp", repr(call.group_tp), "must be a name", 'pass "" where there is no TP')


def check_group_lengths(call: Call, error: type[EvenmoeError]) -> None:
    """group_tp is measured even without TP (§2.13, §3.6); the class of the error is the operator's."""
    for argument, name in (("group_ep", call.group_ep), ("group_tp", call.group_tp)):
        if name is not None and len(name) >= _GROUP_NAME_ENDS:
            value, rule = f"{len(name)} characters long", "must have at most 127 characters"
            raise error(argument, value, rule, "use a shorter group name")


# Attributes, in the order of §2.13 and §3.6 ----------------------------------------------------------------------


def check_virtual_experts(call: Call) -> None:
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        value = getattr(call, name)
        require(value >= 0, name, value, "must be at least 0", "use 0 for none")
    check_sum_of_experts(call)


def check_sum_of_experts(call: Call) -> None:
    total = call.moe_expert_num + call.virtual_experts
    value, rule = (
        f"{total} together with zero, copy and const experts",
        f"must be at most {_INT32_MAX}, for ids are int32",
    )
    require(total <= _INT32_MAX, "moe_expert_num", value, rule, "use fewer experts")


def check_ranks(call: Call) -> None:
    """The two groups' sizes, and this rank in both."""
    ep = call.ep_world_size
    call.limits.check("ep_world_size", ep, "ep_world_size", ep, "must be {}", "use {} ranks")
    check_tp_and_ranks(call)


def check_tp_and_ranks(call: Call) -> None:
    """The size of the group of peers, and this rank in both groups."""
    tp, tp_rank, group_tp = call.tp_world_size, call.tp_rank_id, call.group_tp
    call.limits.check("tp_world_size", tp, "tp_world_size", tp, "must be {}", "use 0 for no TP")
    check_ep_rank(call)
    if tp != 2:
        reserved = isinstance(call, DispatchCall) and not tp_examined(call)  # combine looks at it in every release
        rule, fix = "must be 0 without TP", "use 0, or tp_world_size=2"
        require(tp_rank == 0 or reserved, "tp_rank_id", tp_rank, rule, fix)
        return
    require(tp_rank in (0, 1), "tp_rank_id", tp_rank, "must be 0 or 1", "use the rank within the TP group")
    rule, fix = "must be a name when tp_world_size is 2", "pass the name of the TP group"
    require(bool(group_tp), "group_tp", repr(group_tp), rule, fix)
    rule = "must not be the EP group's name"
    require(group_tp != call.group_ep, "group_tp", repr(group_tp), rule, "use two communicators")


def check_ep_rank(call: Call) -> None:
    rule, fix = f"must be 0 to {call.ep_world_size - 1}", "use the rank within the EP group, counted from 0"
    require(0 <= call.ep_rank_id < call.ep_world_size, "ep_rank_id", call.ep_rank_id, rule, fix)


def check_expert_numbers(call: Call) -> None:
    """How the experts lie on the ranks, and how many there are."""
    shard, shared, experts = call.expert_shard_type, call.shared_expert_num, call.moe_expert_num
    require(shard == 0, "expert_shard_type", shard, "must be 0, shared experts on the first ranks", "use 0")
    call.limits.check("shared_experts", shared, "shared_expert_num", shared, "must be {}", "use {} shared experts")
    check_shared_rank_num(call)
    call.limits.check("physical_experts", experts, "moe_expert_num", experts, "must be {}", "use {} physical experts")


def check_shared_rank_num(call: Call) -> None:
    ranks, ep = call.shared_expert_rank_num, call.ep_world_size
    rule = f"must be 0 to {ep - 1}, so that one of ep_world_size {ep} has MoE experts"
    require(0 <= ranks < ep, "shared_expert_rank_num", ranks, rule, "use fewer ranks for shared experts")


# How the attributes and the tensors' sizes must go together ---------------------------------------------------------


def check_shared_pair(call: Call) -> None:
    shared, ranks = call.shared_expert_num, call.shared_expert_rank_num
    require(
        (shared, ranks) in ((1, 0), (0, 0)) or (shared != 0 and ranks != 0 and ranks % shared == 0),
        "shared_expert_rank_num",
        f"{ranks} with shared_expert_num {shared}",
        "must be a positive multiple of shared_expert_num, or 0 with shared_expert_num 0 or 1",
        "give every shared expert equally many ranks, or none to any",
    )


def check_experts_on_ranks(call: Call) -> None:
    """Equally many MoE experts on each of their ranks: few enough, and one alone with TP, which no world scales down.

    That L is at least 1 follows from the two checks of M before it.
    """
    experts, ep, shared_ranks = call.moe_expert_num, call.ep_world_size, call.shared_expert_rank_num
    moe_ranks, each, elastic = ep - shared_ranks, call.experts_per_rank, call.elastic_info
    rule = f"must divide evenly by the {moe_ranks} ranks that hold MoE experts "
    rule += f"(ep_world_size {ep} less shared_expert_rank_num {shared_ranks})"
    fix = f"use a multiple of {moe_ranks}; pad the slots if need be"
    require(experts % moe_ranks == 0, "moe_expert_num", experts, rule, fix)
    value = f"{experts}, {each} on each rank, times {ep} ranks = {each * ep}"
    rule, fix = "must keep experts per rank times ep_world_size at {}", "use fewer experts per rank"
    call.limits.check("experts_times_ranks", each * ep, "moe_expert_num", value, rule, fix)
    if call.tp_world_size == 2:
        value, rule = f"2 with {each} experts per rank", "must come with 1 expert per rank"
        require(each == 1, "tp_world_size", value, rule, "use one physical expert per MoE rank, or no TP")
        rule = "must be None when tp_world_size is 2"
        require(elastic is None, "elastic_info", elastic, rule, "scale down a world without TP")


def check_tokens(call: Call, sizes: Sizes, argument: str) -> None:
    """Bs and G."""
    tokens, ep, given, mask = sizes.tokens, call.ep_world_size, call.global_bs, call.x_active_mask
    rule, fix = "must have {} tokens", "use {} tokens per call and rank"
    call.limits.check("tokens", tokens, argument, f"of {tokens} tokens", rule, fix)
    total = tokens * ep
    if given in (0, total):
        return
    rule = f"must be 0 or a multiple of ep_world_size {ep} that is at least Bs·ep = {total}"
    fix = "pass ep_world_size times the tokens of the fullest rank"
    require(given >= total and given % ep == 0, "global_bs", given, rule, fix)
    value = f"{mask} with global_bs {given}"
    rule = f"must be None unless every rank has the same Bs, so global_bs 0 or {total}"
    require(mask is None, "x_active_mask", value, rule, "pad every rank to the same Bs and mask the padding")


def check_hidden(call: Call, sizes: Sizes, argument: str) -> None:
    value = f"of width {sizes.hidden}"
    call.limits.check("hidden", sizes.hidden, argument, value, "must have {} columns", "use a hidden size of {}")


def check_top_k(call: Call, sizes: Sizes) -> None:
    top_k, experts = sizes.top_k, call.moe_expert_num + call.virtual_experts
    value, fix = f"of {top_k} columns", "use {} experts per token"
    call.limits.check("top_k", top_k, "expert_ids", value, "must have {} columns", fix)
    rule, fix = f"must have at most {experts} columns, one per expert", "route a token to each expert once at most"
    require(top_k <= experts, "expert_ids", value, rule, fix)


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
    check_absent("performance_info", call.performance_info, "pass None, waiting times are not measured here")


def check_buffer(call: Call, layout: Layout, full_mesh_v2: bool = False, hierarchy: bool = False) -> None:
    """Room for two halves of every rank's tokens in HCCL's buffer (§2.2); a token there is 16-bit."""
    if call.hccl_buffer_bytes is None:
        return
    aligned = _align(2 * layout.hidden, 32) + 44
    # fullmesh_v2 carries 480 bytes in each block of 512.
    sent = -(-aligned // 480) * 512 if full_mesh_v2 else _align(aligned, 512)
    returned = _align(2 * layout.hidden, 512)
    per_token = sent * layout.ep * layout.experts_per_rank + returned * (layout.top_k + layout.shared_experts)
    needs = {"EP": 2 * layout.max_bs * per_token}
    if hierarchy:  # each token with its experts' numbers and weights, and 404 MiB for what the nodes exchange
        per_token = 2 * layout.hidden + 4 * (3 * (layout.top_k + 7) // 8 * 8) + 64
        needs = {"EP": layout.num_experts * layout.max_bs * per_token + 404 * 2**20}
    if layout.tp == 2:
        needs["TP"] = 2 * layout.capacity * (sent + returned)
    for group, need in needs.items():
        rule, fix = (
            f"must be at least {need} for the {group} group",
            f"use HCCL_BUFFSIZE {-(-need // 2**20)} (MB) or more",
        )
        require(need <= call.hccl_buffer_bytes, "hccl_buffer_bytes", call.hccl_buffer_bytes, rule, fix)


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
