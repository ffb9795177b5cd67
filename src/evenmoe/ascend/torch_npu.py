"""The functions of torch_npu with its argument names, order and defaults, and its outputs (specification §5).

Shapes: Bs tokens, H hidden, K experts per token, ep ranks, L experts per rank, A capacity in rows (§2.4), tp peers.
Every function takes what Atlas A3 takes, and raises `NpuCallError` (a RuntimeError, as torch_npu's errors are) where
the chip's first stage fails. `group_ep` and `group_tp` are names: `rank.ep.name` and `rank.tp.name` of an open world
(`evenmoe.local_world`, `evenmoe.process_world`), or `group.group_name` of a torch.distributed group.
"""

from __future__ import annotations

import torch

from evenmoe.ascend.barrier import _npu_distribute_barrier  # noqa: F401  one of the functions here
from evenmoe.ascend.init_routing import npu_moe_init_routing, npu_moe_init_routing_v2  # noqa: F401  as well
from evenmoe.ascend.patching import NotEmulatedError
from evenmoe.ascend.status import NpuCallError  # noqa: F401  what they raise
from evenmoe.ascend.tensors import remember
from evenmoe.ascend.torch_npu_calls import (
    check_as_first_wrapper,
    check_as_wrapper,
    end_half,
    made_from,
    perform_as_wrapper,
    telling,
    update_expert_as_wrapper,
    with_comm_alg,
    with_room_for_nodes,
)
from evenmoe.contract.calls import CombineCall, CombineV1Call, DispatchCall, DispatchV1Call, UpdateExpertCall
from evenmoe.contract.comm_alg import HIERARCHY
from evenmoe.contract.half_calls import (
    CombineSetupCall,
    CombineTeardownCall,
    DispatchSetupCall,
    DispatchTeardownCall,
)
from evenmoe.errors import ConstraintError
from evenmoe.ops.operator import check_devices, check_types

_INT8 = (1, 258)  # as torch_npu writes the dtype: its own number, or torch's with 256 added

Tensor = torch.Tensor


@made_from("update_expert", version=1, required=("local_rank_id", "world_size"), generation="eplb_update_expert")
def npu_moe_eplb_update_expert(call: UpdateExpertCall[Tensor]) -> Tensor:
    """Map logical to physical expert ids by rank; the older operator, of torch_npu 7.1.0 only.

    Args:
        expert_ids: int32 (Bs, K), Bs 1…512, K 1…16, logical experts.
        eplb_table: int32 (E, F), E 1…512, row e = [count, slot ids…, don't care].
        local_rank_id: 0…world_size−1. world_size: 2…384. balance_mode: 0.

    Returns:
        int32 (Bs, K), slot ids as dispatch understands them.

    Raises:
        NpuCallError: what the chip does not take, and ids or table entries out of range.

    Expert 1 has two replicas, in slots 1 and 7; of 8 ranks the last four use slot 7:

    >>> table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    >>> npu_moe_eplb_update_expert(torch.tensor([[0, 1]], dtype=torch.int32), table, 4, 8).tolist()
    [[0, 7]]
    """
    return update_expert_as_wrapper(call)[0]


@made_from("update_expert", version=2)
def npu_moe_update_expert(call: UpdateExpertCall[Tensor]) -> tuple[Tensor, Tensor]:
    """Map logical to physical expert ids, by rank or by token, and mark the entries to prune (§1).

    Args:
        expert_ids: int32 or int64 (Bs, K), Bs 1…512, K 1…16, logical experts.
        eplb_table: int32 (E, F), E 1…1024, row e = [count, slot ids…, don't care].
        expert_scales: float16, bfloat16 or float32 (Bs, K), gate weights, with `pruning_threshold`.
        pruning_threshold: float32 (K,) or (1, K), shares of the token's total weight.
        active_mask: bool (Bs,), only with the two above.
        local_rank_id, world_size: 0…world_size−1 and 2…768 under balance_mode 0, else not looked at.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        balanced_expert_ids: (Bs, K), dtype of expert_ids.
        balanced_active_mask: bool (Bs, K). All True without pruning, where the chip leaves it undefined.

    Raises:
        NpuCallError: what the chip does not take, and ids or table entries out of range.

    >>> table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    >>> ids, mask = npu_moe_update_expert(torch.tensor([[0, 1]]), table, local_rank_id=4, world_size=8)
    >>> ids.tolist(), mask.tolist()
    ([[0, 7]], [[True, True]])
    """
    return update_expert_as_wrapper(call)


@made_from("dispatch", version=4, later_chips=("y_dtype", "x_dtype", "scales_dtype"))
def npu_moe_distribute_dispatch_v2(
    call: DispatchCall[Tensor], **later_chips: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token to the ranks of its experts; a collective of the groups (§2).

    Args:
        x: float16 or bfloat16 (Bs, H), Bs 1…512, H 1024…8192.
        expert_ids: int32 (Bs, K), physical experts, distinct within a token.
        group_ep, ep_world_size, ep_rank_id: the expert-parallel group, its size 2…768, this rank in it.
        moe_expert_num: physical experts over all ranks, 1…1024.
        scales: float32 (shared experts + moe_expert_num, H), only with quant_mode 2.
        x_active_mask: bool (Bs,) or (Bs, K). elastic_info: int32 (4 + 2·ep,).
        expert_scales: float32 (Bs, K), gate weights, which arrive in expand_scales; they enlarge ep_recv_counts too.
        group_tp, tp_world_size, tp_rank_id: two tensor-parallel peers, or "" and 0.
        quant_mode: 0, or 2 for int8. expert_token_nums_type: 1 for counts, 0 for prefix sums.
        performance_info, y_dtype, x_dtype, scales_dtype: only None on this chip.
        All others: as in `evenmoe.dispatch`.

    Returns:
        expand_x (max(A, A·tp), H), dtype of x or int8; dynamic_scales float32 (A·max(tp, 1),); assist_info_for_combine
        int32 (max(Bs·K, 128·A),); expert_token_nums int64 (L,); ep_recv_counts int32 (ep·L·max(tp, 1),), with
        expert_scales longer by 2·global_bs·K·(ep // 8); tp_recv_counts int32 (tp,); expand_scales float32 (A,).
        What the chip leaves unwritten is zero.

    Raises:
        NpuCallError: what the chip does not take, a group that is not open here, ranks that disagree, ids out of range.

    >>> import evenmoe as em
    >>> def step(rank):
    ...     x = torch.full((1, 1024), float(rank.index), dtype=torch.bfloat16)
    ...     ids = torch.tensor([[1 - rank.index]], dtype=torch.int32)
    ...     return npu_moe_distribute_dispatch_v2(x, ids, rank.ep.name, 2, rank.index, 2)[0][0, 0].item()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)
    [1.0, 0.0]
    """
    *outputs, number = perform_as_wrapper("dispatch", call, lambda: check_as_wrapper(call, later_chips))
    expand_x, dynamic_scales, assist_info, token_nums, ep_recv_counts, tp_recv_counts, expand_scales = outputs
    remember(assist_info, number)
    if call.comm_alg != HIERARCHY:  # which allocates them itself
        ep_recv_counts = with_room_for_nodes(ep_recv_counts, call)
    return expand_x, dynamic_scales, assist_info, token_nums, ep_recv_counts, tp_recv_counts, expand_scales


@made_from("dispatch_v1", version=1)
def npu_moe_distribute_dispatch(
    call: DispatchV1Call[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token to the ranks of its experts, the first version; a collective of the groups (§2.17).

    Args:
        x: float16 or bfloat16 (Bs, H), Bs 1…512, H 7168.
        expert_ids: int32 (Bs, K), K 1…8, physical experts, distinct within a token.
        group_ep, ep_world_size, ep_rank_id: the expert-parallel group, its size 8, 16, 32, 64, 128, 144, 256 or 288.
        moe_expert_num: physical experts over all ranks, 1…512.
        scales: float32 (1 with ranks for the shared expert + moe_expert_num, H), only with quant_mode 2.
        x_active_mask: bool, not looked at on this chip. expert_scales: float32; they enlarge ep_recv_counts.
        shared_expert_num: 1. shared_expert_rank_num: a divisor of ep_world_size, or 0.
        All others: as in `npu_moe_distribute_dispatch_v2`.

    Returns:
        expand_x, dynamic_scales, expand_idx, expert_token_nums, ep_recv_counts, tp_recv_counts, expand_scales: as in
        `npu_moe_distribute_dispatch_v2`, but expand_idx int32 (Bs·K,): which of the rows that this rank sends to an
        expert each token and k is. expand_scales are zero.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_v2`.

    Eight ranks of one expert each; everybody's two tokens ask for expert 3:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     x, ids = torch.ones((2, 7168), dtype=torch.bfloat16), torch.full((2, 1), 3, dtype=torch.int32)
    ...     out = npu_moe_distribute_dispatch(x, ids, rank.ep.name, 8, rank.index, 8)
    ...     return out[2].tolist(), out[3].item()
    >>> with em.local_world(ep_size=8) as world:
    ...     world.run(step)[2:4]
    [([0, 1], 0), ([0, 1], 16)]
    """
    *outputs, number = perform_as_wrapper("dispatch_v1", call, lambda: check_as_first_wrapper(call))
    expand_x, dynamic_scales, expand_idx, token_nums, ep_recv_counts, tp_recv_counts, expand_scales = outputs
    remember(expand_idx, number)
    ep_recv_counts = with_room_for_nodes(ep_recv_counts, call)
    return expand_x, dynamic_scales, expand_idx, token_nums, ep_recv_counts, tp_recv_counts, expand_scales


@made_from("combine", 4, without=("activation_scale", "weight_scale", "group_list", "out_dtype", "group_list_type"))
def npu_moe_distribute_combine_v2(call: CombineCall[Tensor]) -> Tensor:
    """Return the experts' rows to their tokens and add them up, weighted; a collective of the groups (§3).

    Args:
        expand_x: float16 or bfloat16 (at least A·tp, H), the experts' outputs in the row order of dispatch's expand_x.
        expert_ids, x_active_mask, elastic_info, and every attribute: those that dispatch was called with.
        assist_info_for_combine, ep_send_counts, tp_send_counts: dispatch's assist_info_for_combine, ep_recv_counts and
            tp_recv_counts. Without tensor parallelism tp_send_counts may be None.
        expert_scales: float32 (Bs, K), gate weights.
        All others: as in `evenmoe.combine`.

    Returns:
        (Bs, H), dtype of expand_x. Rows of inactive tokens, which the chip leaves unwritten, are zero.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_v2`.
    """
    return perform_as_wrapper("combine", call)


@made_from("combine_v1", version=2)
def npu_moe_distribute_combine(call: CombineV1Call[Tensor]) -> Tensor:
    """Return the experts' rows to their tokens and add them up, weighted, the first version; a collective (§3.8).

    Args:
        expand_x: float16 or bfloat16 (at least A·tp, 7168), the experts' outputs in the row order of dispatch's.
        expand_idx, ep_send_counts, tp_send_counts: expand_idx, ep_recv_counts and tp_recv_counts of
            `npu_moe_distribute_dispatch`. Without tensor parallelism tp_send_counts may be None.
        expert_scales: float32 (Bs, K), gate weights. x_active_mask: bool, not looked at on this chip.
        activation_scale, weight_scale, group_list, shared_expert_x: only None. expand_scales, out_dtype,
            group_list_type: not looked at.
        All others: those that dispatch was called with; comm_quant_mode as in `npu_moe_distribute_combine_v2`.

    Returns:
        (Bs, 7168), dtype of expand_x.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_v2`.
    """
    return perform_as_wrapper("combine_v1", call)


@made_from("combine_add_rms_norm", version=2, renamed={"assist_info_for_combine": "expand_idx"})
def npu_moe_distribute_combine_add_rms_norm(call: CombineCall[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Combine without rounding, add the residual and apply RmsNorm; a collective of the groups (§4).

    Args:
        expand_x: bfloat16 (at least A·tp, H), as in `npu_moe_distribute_combine_v2`, like all that is not named here.
        expand_idx: dispatch's assist_info_for_combine.
        residual_x: bfloat16 (Bs, 1, H). gamma: bfloat16 (H,). norm_eps: added to the mean square.
        activation_scale, weight_scale, group_list: only None. out_dtype, group_list_type: not looked at.

    Returns:
        y: bfloat16 (Bs, 1, H). rstd_out: float32 (Bs, 1, 1). x: bfloat16 (Bs, 1, H). Rows of inactive tokens, which
        the chip leaves unwritten, are zero.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_v2`.
    """
    return perform_as_wrapper("combine_add_rms_norm", call)


@made_from("dispatch_setup", version=1, later_chips=("y_dtype",))
def npu_moe_distribute_dispatch_setup(
    call: DispatchSetupCall[Tensor], y_dtype: object = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Begin to send each token to the ranks of its experts, and return at once (§14).

    Args:
        x: float16 or bfloat16 (Bs, H), Bs 1…512, H 1024…8192.
        expert_ids: int32 (Bs, K), physical experts, distinct within a token.
        group_ep, ep_world_size, ep_rank_id: the expert-parallel group, its size 2…384, this rank in it.
        moe_expert_num: physical experts over all ranks, 1…512.
        scales: float32 (shared_expert_num + moe_expert_num, H), only with quant_mode 2. x_active_mask: bool (Bs,).
        quant_mode: 0, or 2 for int8. y_dtype: None, or that of y: 1 for int8.
        comm_type: only 2. comm_alg: only "". expert_shard_type: only 0.
        shared_expert_num, shared_expert_rank_num, global_bs: as in `evenmoe.dispatch`.

    Returns:
        y: (Bs·(K + shared_expert_num), columns), the tokens as they travel. expand_idx: int32 (Bs·K,), for
        `npu_moe_distribute_combine_teardown`. comm_cmd_info: int32, for `npu_moe_distribute_dispatch_teardown`.

    Raises:
        NpuCallError: what the chip does not take, a group that is not open here, ids out of range.
    """
    with telling("dispatch", call):
        if y_dtype is not None and (call.quant_mode == 0 or y_dtype not in _INT8):
            rule = "must be None, or int8 (1) under quant_mode 2"
            raise ConstraintError("y_dtype", repr(y_dtype), rule, "leave it out")
        arguments = check_types("dispatch_setup", with_comm_alg(call))
        check_devices(arguments)
    return torch.ops.evenmoe.dispatch_setup(**arguments)


@made_from("dispatch_teardown", version=1)
def npu_moe_distribute_dispatch_teardown(
    call: DispatchTeardownCall[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wait for what `npu_moe_distribute_dispatch_setup` began (§14).

    Args:
        x, expert_ids, and every attribute: those of the setup. y, comm_cmd_info: what it gave.
        expert_token_nums_type: only 1, counts.

    Returns:
        expand_x (A, H), dtype of y; dynamic_scales float32 (A,), with quant_mode 2; assist_info_for_combine int32
        (128·A,), for `npu_moe_distribute_combine_setup`; expert_token_nums int64 (L,). What the chip leaves unwritten
        is zero.

    Raises:
        NpuCallError: what the chip does not take, a comm_cmd_info of no setup or of another, ranks that disagree.
    """
    return end_half("dispatch_teardown", call)


@made_from("combine_setup", version=1)
def npu_moe_distribute_combine_setup(call: CombineSetupCall[Tensor]) -> tuple[Tensor, Tensor]:
    """Begin to return the experts' rows to their tokens, and return at once (§14).

    Args:
        expand_x: float16 or bfloat16 (at least A, H), the experts' outputs in the row order of dispatch's expand_x.
        expert_ids, and every attribute that dispatch has too: as there; shared_expert_num and shared_expert_rank_num
            only 0.
        assist_info_for_combine: what `npu_moe_distribute_dispatch_teardown` gave.
        comm_quant_mode: only 0.

    Returns:
        quant_expand_x: int8, empty. comm_cmd_info: int32. Both for `npu_moe_distribute_combine_teardown`.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_setup`.
    """
    with telling("combine", call):
        arguments = check_types("combine_setup", with_comm_alg(call))
        check_devices(arguments)
    return torch.ops.evenmoe.combine_setup(**arguments)


@made_from("combine_teardown", version=1)
def npu_moe_distribute_combine_teardown(call: CombineTeardownCall[Tensor]) -> Tensor:
    """Wait for what `npu_moe_distribute_combine_setup` began, and add up the rows of each token, weighted (§14).

    Args:
        expand_x, expert_ids, and every attribute: those of the setup. quant_expand_x, comm_cmd_info: what it gave.
        expand_idx: what `npu_moe_distribute_dispatch_setup` gave.
        expert_scales: float32 (Bs, K), gate weights.
        x_active_mask: bool (Bs,), as in dispatch. shared_expert_x: only None.

    Returns:
        (Bs, H), dtype of expand_x. Rows of inactive tokens, which the chip leaves unwritten, are zero.

    Raises:
        NpuCallError: as in `npu_moe_distribute_dispatch_teardown`.
    """
    return end_half("combine_teardown", call)


def __getattr__(name: str) -> object:
    if name in ("npu", "testing"):
        rule, fix = "needs patch(npu=True)", "call evenmoe.ascend.patch(npu=True) first"
        raise NotEmulatedError(f"torch_npu.{name}", "not in place", rule, fix)
    emulated = sorted(other for other in globals() if "npu_" in other)
    fix = "write it with torch's own functions, or run this part on the chip"
    raise NotEmulatedError(f"torch_npu.{name}", "not emulated", f"must be one of {', '.join(emulated)}", fix)
