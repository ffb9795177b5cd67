"""The functions of torch_npu with its argument names, order and defaults, and its outputs (specification §5).

Shapes: Bs tokens, H hidden, K experts per token, ep ranks, L experts per rank, A capacity in rows (§2.4), tp peers.
Every function takes what Atlas A3 takes, and raises `NpuCallError` (a RuntimeError, as torch_npu's errors are) where
the chip's first stage fails. `group_ep` and `group_tp` are names: `rank.ep.name` and `rank.tp.name` of an open world
(`evenmoe.local_world`, `evenmoe.process_world`), or `group.group_name` of a torch.distributed group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch

from evenmoe.ascend.barrier import _npu_distribute_barrier  # noqa: F401  one of the functions here
from evenmoe.ascend.executor import check_call
from evenmoe.ascend.groups import find_group
from evenmoe.ascend.init_routing import npu_moe_init_routing, npu_moe_init_routing_v2  # noqa: F401  as well
from evenmoe.ascend.patching import UNCHECKED, NotEmulatedError, in_effect
from evenmoe.ascend.status import NpuCallError, of_the_chip
from evenmoe.ascend.tensors import number_of, remember
from evenmoe.contract.calls import CombineCall, CombineV1Call, DispatchCall, DispatchV1Call, UpdateExpertCall
from evenmoe.contract.comm_alg import HIERARCHY
from evenmoe.contract.dispatch import check_token_nums_type
from evenmoe.contract.distribute import check_ep_rank, check_shared_pair, check_shared_rank_num
from evenmoe.contract.limits import ATLAS_A3
from evenmoe.contract.operators import OPERATORS, Argument, Kind
from evenmoe.contract.tensor_spec import TensorSpec, check_dims
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError
from evenmoe.ops.exchange import check_range
from evenmoe.ops.operator import CALL_TYPES, check_devices, check_types, find_groups, in_order, parts_of, specs_of
from evenmoe.transport.call import together
from evenmoe.transport.transport import Transport

_RANKS_PER_NODE = 8  # of Atlas A2, in the room that the wrapper makes for its counts (§5)

_TYPES: dict[Kind, type] = {"tensor": torch.Tensor, "str": str, "int": int, "float": float}
_Result = TypeVar("_Result")
Tensor = torch.Tensor
_Collective: TypeAlias = DispatchCall[Tensor] | CombineCall[Tensor]


def _function(
    operator: str,
    version: int,
    *,
    without: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
    later_chips: tuple[str, ...] = (),
    **fields: object,
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Makes a function of torch_npu from one of a call object, and its errors those of torch_npu.

    Args:
        operator, version: of the table; what must be given comes by position, everything else by keyword.
        without: arguments that torch_npu does not take.
        required: arguments that must be given here, although the newest version has a default.
        renamed: {name of the table: name in torch_npu}.
        later_chips: arguments that only later chips take, None here.
        fields: of every call.
    """
    names = renamed or {}
    taken = [a for a in OPERATORS[operator].published(version) if a.kind != "output" and a.name not in without]
    first = [argument for argument in taken if argument.required or argument.name in required]
    others = [argument for argument in taken if argument not in first] + [Argument(name, "int") for name in later_chips]
    by_position, by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    positions = [names.get(argument.name, argument.name) for argument in first]
    defaults = {argument.name: argument.default for argument in others}
    parameters = [
        inspect.Parameter(name, by_position, annotation=_TYPES[argument.kind])
        for name, argument in zip(positions, first, strict=True)
    ]
    for argument in others:
        kind = _TYPES[argument.kind] if argument.default is not None else _TYPES[argument.kind] | None
        parameters.append(inspect.Parameter(argument.name, by_keyword, default=argument.default, annotation=kind))
    signature = inspect.Signature(parameters)

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @wraps(function)
        def call(*args: object, **kwargs: object) -> _Result:
            given = {**defaults, **dict(zip(positions, args, strict=False)), **kwargs}
            twice = not kwargs.keys().isdisjoint(positions[: len(args)])
            if twice or len(args) > len(positions) or given.keys() != signature.parameters.keys():
                signature.bind(*args, **kwargs)  # raises the TypeError; it would take a tenth of a whole call
            unknown = {name: given.pop(name) for name in later_chips}
            for name, theirs in names.items():
                given[name] = given.pop(theirs)
            try:
                checked = operator == "update_expert" or not in_effect(UNCHECKED)
                return function(
                    CALL_TYPES[operator](**given, **fields, limits=ATLAS_A3, check_values=checked), **unknown
                )
            except EvenmoeError as error:
                argument, fix = error.argument, of_the_chip(error).fix
                if argument in names:
                    fix = fix.replace("output of this name", argument)
                raised = NpuCallError(names.get(argument, argument), error.value, error.rule, fix)
                raised.status = error.status
                raise raised from error

        setattr(call, "__signature__", signature)  # noqa: B010  what help() shows
        return call

    return decorate


@_function("update_expert", version=1, required=("local_rank_id", "world_size"), generation="eplb_update_expert")
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
    return _update_expert(call)[0]


@_function("update_expert", version=2)
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
    return _update_expert(call)


def _update_expert(call: UpdateExpertCall[Tensor]) -> tuple[Tensor, Tensor]:
    arguments = check_types("update_expert", call)
    if call.old or call.balance_mode not in (0, 1):  # the registered operator takes more rules, and checks the rest
        check_call(specs_of(call))
    return torch.ops.evenmoe.update_expert(**arguments)


@_function("dispatch", version=4, later_chips=("y_dtype", "x_dtype", "scales_dtype"))
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
    *outputs, number = _perform("dispatch", call, lambda: _check_as_wrapper(call, later_chips))
    expand_x, dynamic_scales, assist_info, token_nums, ep_recv_counts, tp_recv_counts, expand_scales = outputs
    if not call.check_values and ep_recv_counts.max() > len(dynamic_scales):
        rule, fix = f"must bring at most {len(dynamic_scales)} rows", "let no expert occur twice in a token"
        raise NpuCallError("expert_ids", f"such that {ep_recv_counts.max()} rows came here", rule, fix)
    remember(assist_info, number)
    if call.comm_alg != HIERARCHY:  # which allocates them itself
        ep_recv_counts = _with_room_for_nodes(ep_recv_counts, call)
    return expand_x, dynamic_scales, assist_info, token_nums, ep_recv_counts, tp_recv_counts, expand_scales


@_function("dispatch_v1", version=1)
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
    *outputs, number = _perform("dispatch_v1", call, lambda: _check_as_first_wrapper(call))
    expand_x, dynamic_scales, expand_idx, token_nums, ep_recv_counts, tp_recv_counts, expand_scales = outputs
    remember(expand_idx, number)
    ep_recv_counts = _with_room_for_nodes(ep_recv_counts, call)
    return expand_x, dynamic_scales, expand_idx, token_nums, ep_recv_counts, tp_recv_counts, expand_scales


def _with_room_for_nodes(ep_recv_counts: Tensor, call: DispatchCall[Tensor]) -> Tensor:
    if call.expert_scales is None:
        return ep_recv_counts
    tokens, top_k = call.expert_ids.shape
    more = 2 * (call.global_bs or tokens * call.ep_world_size) * top_k * (call.ep_world_size // _RANKS_PER_NODE)
    return torch.cat([ep_recv_counts, ep_recv_counts.new_zeros(more)])


@_function("combine", 4, without=("activation_scale", "weight_scale", "group_list", "out_dtype", "group_list_type"))
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
    return _perform("combine", call)


@_function("combine_v1", version=2)
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
    return _perform("combine_v1", call)


@_function("combine_add_rms_norm", version=2, renamed={"assist_info_for_combine": "expand_idx"})
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
    return _perform("combine_add_rms_norm", call)


def _check_as_wrapper(call: DispatchCall[Tensor], later_chips: Mapping[str, object]) -> None:
    """What torch_npu looks at before the first stage does."""
    for name, value in later_chips.items():
        if value is not None:
            raise ConstraintError(name, repr(value), "must be None on Atlas A3", "leave it out")
    specs: DispatchCall[TensorSpec] = specs_of(call)
    check_dims("x", specs.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", specs.expert_ids, (2,), "(tokens, top_k)")
    check_ep_rank(specs)
    check_shared_rank_num(specs)
    check_shared_pair(specs)
    check_token_nums_type(specs)


def _check_as_first_wrapper(call: DispatchV1Call[Tensor]) -> None:
    """What the function of the first version looks at before the first stage does."""
    specs: DispatchV1Call[TensorSpec] = specs_of(call)
    check_dims("x", specs.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", specs.expert_ids, (2,), "(tokens, top_k)")
    check_shared_rank_num(specs)
    check_token_nums_type(specs)


def _perform(operator: str, call: _Collective, check_first: Callable[[], None] = lambda: None) -> Any:
    """Complete a call as the wrapper does, and let the operator compute it; the other ranks are told of an error."""
    ep, tp = _find_groups(operator, call)
    rows = call.x if isinstance(call, DispatchCall) else call.expand_x
    exchanged = "combine" if operator == "combine_add_rms_norm" else operator
    parts = parts_of(exchanged, ep, tp, call.elastic_info is not None, rows)
    with together(*in_order(exchanged, *parts)):
        arguments = check_types(operator, _completed(call))
        check_first()
        check_devices(arguments)
        if not call.check_values:  # ids may occur twice in a token, and nothing else
            check_range(call.expert_ids, call.moe_expert_num + call.virtual_experts)
        return getattr(torch.ops.evenmoe, operator)(**arguments)


def _find_groups(operator: str, call: _Collective) -> tuple[Transport, Transport | None]:
    try:
        return find_groups(call, find_group)
    except (ConstraintError, TypeError):
        # What is wrong with the call itself comes first, as on the chip.
        call = _completed(call)
        check_types(operator, call)
        check_call(specs_of(call))
        raise


def _completed(call: _Collective) -> _Collective:
    for name, value in (("group_ep", call.group_ep), ("group_tp", call.group_tp)):
        if value is None:
            raise MissingArgumentError(name, None, "must be a name", 'pass a str, "" for no tensor parallelism')
    if isinstance(call, DispatchCall):
        return replace(call, comm_alg="") if call.comm_alg is None else call
    number = number_of(call.expand_idx if isinstance(call, CombineV1Call) else call.assist_info_for_combine)
    return replace(call, comm_alg="" if call.comm_alg is None else call.comm_alg, dispatch_number=number)


def __getattr__(name: str) -> object:
    if name in ("npu", "testing"):
        rule, fix = "needs patch(npu=True)", "call evenmoe.ascend.patch(npu=True) first"
        raise NotEmulatedError(f"torch_npu.{name}", "not in place", rule, fix)
    emulated = sorted(other for other in globals() if "npu_" in other)
    fix = "write it with torch's own functions, or run this part on the chip"
    raise NotEmulatedError(f"torch_npu.{name}", "not emulated", f"must be one of {', '.join(emulated)}", fix)
