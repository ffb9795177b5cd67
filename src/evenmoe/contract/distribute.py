"""The arguments that dispatch and combine share, and the checks of each attribute by itself, one function for each.

The order in which they run is each operator's own: see `dispatch.py` and `combine.py`. How the attributes and the
tensors' sizes must go together is in `distribute_sizes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from evenmoe.contract.layout import Layout
from evenmoe.contract.limits import ATLAS_A3, Limits
from evenmoe.contract.tensor_spec import Input
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError

_INT32_MAX = 2**31 - 1
_GROUP_NAME_ENDS = 128  # HCCL_GROUP_NAME_MAX: a name of so many characters or more is refused

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


@dataclass(slots=True, kw_only=True)
class DistributeCall:
    """What every call of dispatch and combine has (specification §2.2), as specs and plain values.

    Attributes:
        expert_ids: int32 (Bs, K).
        group_ep, group_tp: names of 1…127 characters; group_tp may be "" without TP.
        ep_world_size, ep_rank_id, tp_world_size, tp_rank_id: int. tp_world_size 0 and 1 both mean no TP.
        moe_expert_num: int, physical MoE experts over all ranks.
        x_active_mask: bool (Bs,) or (Bs, K), or None.
        elastic_info: int32 (4 + 2·ep,), or None.
        performance_info: only None.
        expert_shard_type: only 0.
        shared_expert_num, shared_expert_rank_num: int; the default 1 and 0 together mean none.
        global_bs: int, tokens of the fullest rank times ep, or 0 when every rank has Bs.
        comm_alg: "", "fullmesh_v1" or "fullmesh_v2"; None is taken as "".
        zero_expert_num, copy_expert_num, const_expert_num: int, virtual experts with the ids after moe_expert_num.
        hccl_buffer_bytes: int, size of each group's communication buffer, or None: do not check it.
        limits: `Limits`.
        tokens, hidden, top_k: int, Bs, H and K; known once the tensors' ranks are checked.
        layout: `Layout`; known once every attribute is checked.
    """

    expert_ids: Input
    group_ep: str | None
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    x_active_mask: Input = None
    elastic_info: Input = None
    performance_info: Input = None
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
    limits: Limits = ATLAS_A3
    tokens: int = field(init=False)
    hidden: int = field(init=False)
    top_k: int = field(init=False)
    layout: Layout = field(init=False)

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


# The aclnn wrapper ----------------------------------------------------------------------------------------------


def check_group_given(call: DistributeCall) -> None:
    if not isinstance(call.group_ep, str) or not call.group_ep:
        raise MissingArgumentError("group_ep", repr(call.group_ep), "must be a name", "pass the name of the EP group")
    if not isinstance(call.group_tp, str):
        raise MissingArgumentError("group_tp", repr(call.group_tp), "must be a name", 'pass "" where there is no TP')


def check_group_lengths(call: DistributeCall, error: type[EvenmoeError]) -> None:
    """group_tp is measured even without TP (§2.13, §3.6); the class of the error is the operator's."""
    for argument, name in (("group_ep", call.group_ep), ("group_tp", call.group_tp)):
        if name is not None and len(name) >= _GROUP_NAME_ENDS:
            raise error(
                argument, f"{len(name)} characters long", "must have at most 127 characters", "use a shorter group name"
            )


# Attributes, in the order of §2.13 and §3.6 ----------------------------------------------------------------------


def check_virtual_experts(call: DistributeCall) -> None:
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        value = getattr(call, name)
        if value < 0:
            raise ConstraintError(name, value, "must be at least 0", "use 0 for none")
    check_sum_of_experts(call)


def check_sum_of_experts(call: DistributeCall) -> None:
    total = call.moe_expert_num + call.virtual_experts
    if total > _INT32_MAX:
        raise ConstraintError(
            "moe_expert_num",
            f"{total} together with zero, copy and const experts",
            f"must be at most {_INT32_MAX}, for ids are int32",
            "use fewer experts",
        )


def check_ep_world_size(call: DistributeCall) -> None:
    ep = call.ep_world_size
    call.limits.check("ep_world_size", ep, "ep_world_size", ep, "must be {}", "use {} ranks")


def check_tp_world_size(call: DistributeCall) -> None:
    if call.tp_world_size not in (0, 1, 2):
        raise ConstraintError("tp_world_size", call.tp_world_size, "must be 0, 1 or 2", "use 0 for no TP")


def check_ep_rank(call: DistributeCall) -> None:
    if not 0 <= call.ep_rank_id < call.ep_world_size:
        last = call.ep_world_size - 1
        raise ConstraintError(
            "ep_rank_id", call.ep_rank_id, f"must be 0 to {last}", "use the rank within the EP group, counted from 0"
        )


def check_tp_rank(call: DistributeCall) -> None:
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


def check_shard_type(call: DistributeCall) -> None:
    if call.expert_shard_type != 0:
        raise ConstraintError(
            "expert_shard_type", call.expert_shard_type, "must be 0, shared experts on the first ranks", "use 0"
        )


def check_shared_expert_num(call: DistributeCall) -> None:
    shared = call.shared_expert_num
    call.limits.check("shared_experts", shared, "shared_expert_num", shared, "must be {}", "use {} shared experts")


def check_shared_rank_num(call: DistributeCall) -> None:
    if not 0 <= call.shared_expert_rank_num < call.ep_world_size:
        raise ConstraintError(
            "shared_expert_rank_num",
            call.shared_expert_rank_num,
            f"must be 0 to {call.ep_world_size - 1}, so that one of ep_world_size {call.ep_world_size} has MoE experts",
            "use fewer ranks for shared experts",
        )


def check_moe_expert_num(call: DistributeCall) -> None:
    experts = call.moe_expert_num
    call.limits.check("physical_experts", experts, "moe_expert_num", experts, "must be {}", "use {} physical experts")
