"""What MoeDistributeCombineV2 and MoeDistributeCombineAddRmsNorm accept (specification §3.2, §3.6, §4).

The second is the first with a residual and a norm behind it, so it is checked by the same sequence: where the two
differ, the call object says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from evenmoe.contract import distribute as attribute
from evenmoe.contract import distribute_sizes as size
from evenmoe.contract.arguments import check_integers, takes
from evenmoe.contract.distribute import INTEGER_ATTRIBUTES, DistributeCall
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import (
    ALLOCATED,
    Input,
    Output,
    TensorSpec,
    check_absent,
    check_dims,
    check_dtype,
    check_dtype_of,
    check_given,
    check_length,
    check_shape,
)
from evenmoe.errors import ConstraintError, UnsupportedTypeError

_INT8_TRANSPORT = 2


@dataclass(slots=True, kw_only=True)
class CombineCall(DistributeCall):
    """Everything that combine is called with; the fields of `DistributeCall`, and these.

    Attributes:
        expand_x: float16 or bfloat16 (at least A·tp, H), the experts' outputs in dispatch's row order.
        assist_info_for_combine: int32 (at least 128·A,), dispatch's.
        ep_send_counts: int32 (at least ep·L·tp,), dispatch's ep_recv_counts.
        expert_scales: float32 (Bs, K), gate weights.
        tp_send_counts: int32 (tp,), dispatch's tp_recv_counts; None only without TP and not on Atlas A3.
        activation_scale, weight_scale, group_list: only None.
        expand_scales: float32, ignored, or None.
        shared_expert_x: (Bs, H) or (a, b, H) with a·b = Bs, or None; only without ranks of shared experts.
        ori_x: (Bs, H), the tokens; needed when there are copy or const experts.
        const_expert_alpha_1, const_expert_alpha_2, const_expert_v: (const_expert_num, H); needed when there are any.
        out_dtype, group_list_type: not examined.
        comm_quant_mode: int, 0, or 2 for rows that travel as int8.
        x_out: (Bs, H), the output; `ALLOCATED` when the operator allocates it. None is a null pointer.
            These tensors all have expand_x's dtype.
    """

    expand_x: Input
    assist_info_for_combine: Input
    ep_send_counts: Input
    expert_scales: Input
    tp_send_counts: Input = None
    activation_scale: Input = None
    weight_scale: Input = None
    group_list: Input = None
    expand_scales: Input = None
    shared_expert_x: Input = None
    ori_x: Input = None
    const_expert_alpha_1: Input = None
    const_expert_alpha_2: Input = None
    const_expert_v: Input = None
    out_dtype: int = 0
    comm_quant_mode: int = 0
    group_list_type: int = 0
    x_out: Output = ALLOCATED


@dataclass(slots=True, kw_only=True)
class AddRmsNormCall(CombineCall):
    """Everything that combine_add_rms_norm is called with; the fields of `CombineCall`, and these (§4).

    Attributes:
        expand_x: bfloat16 on Atlas A3.
        residual_x: (Bs, 1, H), expand_x's dtype.
        gamma: (H,), expand_x's dtype. Also (Bs, 1, H), which the operator's first page shows; the rows are then equal.
        norm_eps: float, not examined.
        y_out, x_out: (Bs, 1, H), expand_x's dtype.
        rstd_out: float32 (Bs, 1, 1).
    """

    residual_x: Input
    gamma: Input
    norm_eps: float = 1e-6
    y_out: Output = ALLOCATED
    rstd_out: Output = ALLOCATED


@takes(CombineCall)
def check_combine(call: CombineCall) -> Layout:
    """Checks one rank's call of combine, and derives its layout.

    The arguments are the fields of `CombineCall` by keyword; of several mistakes the first in the order of
    specification §3.6 is raised.

    Raises:
        MissingArgumentError: a null tensor or group name.
        UnsupportedTypeError: a dtype that the operator does not take, or a group name of 128 characters or more.
        ConstraintError: everything else.

    Eight ranks with one expert each, 8 tokens on every rank, each for 3 experts:

    >>> from evenmoe.contract.limits import LAPTOP
    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> layout = check_combine(
    ...     expand_x=TensorSpec((64, 7168), "bfloat16"), expert_ids=TensorSpec((8, 3), "int32"),
    ...     assist_info_for_combine=TensorSpec((8192,), "int32"), ep_send_counts=TensorSpec((8,), "int32"),
    ...     expert_scales=TensorSpec((8, 3), "float32"),
    ...     group_ep="ep", ep_world_size=8, ep_rank_id=0, moe_expert_num=8, limits=LAPTOP)
    >>> layout.num_tokens, layout.hidden
    (8, 7168)
    """
    check_wrapper(call)
    check_tiling(call)
    return call.layout


@takes(AddRmsNormCall)
def check_combine_add_rms_norm(call: AddRmsNormCall) -> Layout:
    """Checks one rank's call of combine with add and RMS norm, and derives its layout.

    The arguments are the fields of `AddRmsNormCall` by keyword. The order and the errors are those of
    `check_combine`; a virtual expert number is refused only when it is −1 (specification §4).

    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> check_combine_add_rms_norm(
    ...     expand_x=TensorSpec((64, 7168), "bfloat16"), expert_ids=TensorSpec((8, 3), "int32"),
    ...     assist_info_for_combine=TensorSpec((8192,), "int32"), ep_send_counts=TensorSpec((8,), "int32"),
    ...     expert_scales=TensorSpec((8, 3), "float32"), residual_x=None, gamma=TensorSpec((7168,), "bfloat16"),
    ...     group_ep="ep", ep_world_size=8, ep_rank_id=0, moe_expert_num=8)
    Traceback (most recent call last):
    evenmoe.errors.MissingArgumentError: `residual_x` is None: it must be given; pass what is added before the norm.
    """
    check_wrapper(call)
    # The wrapper lets these pass, so they come after the group names (§4, §10).
    check_given("residual_x", call.residual_x, "pass what is added before the norm")
    check_given("gamma", call.gamma, "pass the norm's weight")
    check_given("y_out", call.y_out, "pass a tensor for this output")
    check_given("rstd_out", call.rstd_out, "pass a tensor for this output")
    check_tiling(call)
    return call.layout


def check_wrapper(call: CombineCall) -> None:
    """What the aclnn wrapper looks at: null pointers and the lengths of the group names."""
    check_given("expand_x", call.expand_x, "pass the experts' outputs in dispatch's row order")
    check_given("expert_ids", call.expert_ids, "pass the ids that dispatch was called with")
    check_given("assist_info_for_combine", call.assist_info_for_combine, "pass dispatch's output of this name")
    check_given("ep_send_counts", call.ep_send_counts, "pass dispatch's ep_recv_counts")
    check_given("expert_scales", call.expert_scales, "pass the gate weights")
    check_given("x_out", call.x_out, "pass a tensor for this output")
    attribute.check_group_given(call)
    attribute.check_group_lengths(call, UnsupportedTypeError)


def check_tiling(call: CombineCall) -> None:
    """Everything else, in the order of §3.6. Derives `tokens`, `hidden`, `top_k` and `layout` on the way."""
    check_integers(call, (*INTEGER_ATTRIBUTES, "comm_quant_mode"))
    check_virtual_experts(call)
    attribute.check_ep_world_size(call)
    attribute.check_tp_world_size(call)
    attribute.check_ep_rank(call)
    attribute.check_tp_rank(call)
    check_tp_transport(call)
    attribute.check_shard_type(call)
    attribute.check_shared_expert_num(call)
    attribute.check_shared_rank_num(call)
    attribute.check_moe_expert_num(call)
    check_comm_quant_mode(call)
    check_tensor_dims(call)
    check_dtypes(call)
    size.check_shared_pair(call)
    size.check_divisible(call)
    size.check_experts_per_rank(call)
    size.check_tp_experts(call)
    size.check_tp_elastic(call)
    size.check_tokens(call, "expert_ids")
    size.check_global_bs(call)
    check_virtual_inputs_given(call)
    size.check_top_k(call)
    size.check_elastic_shape(call)
    size.derive_layout(call)
    check_rows(call)
    size.check_hidden(call, "expand_x")
    check_dispatch_outputs(call)
    check_shape("expert_scales", call.expert_scales, (call.tokens, call.top_k), "one weight per token and k")
    size.check_mask_shape(call)
    check_shared_expert_x(call)
    check_norm_and_out(call)
    check_virtual_inputs_shape(call)
    size.check_performance_info(call)
    size.check_buffer(call)


def check_virtual_experts(call: CombineCall) -> None:
    if not isinstance(call, AddRmsNormCall):
        return attribute.check_virtual_experts(call)
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        if getattr(call, name) == -1:
            raise ConstraintError(name, -1, "must not be -1", "use 0 for none")
    attribute.check_sum_of_experts(call)


def check_tp_transport(call: CombineCall) -> None:
    if call.tp_world_size == 2 and call.comm_quant_mode != 0:
        raise ConstraintError(
            "comm_quant_mode", call.comm_quant_mode, "must be 0 when tp_world_size is 2", "use 0, or no TP"
        )


def check_comm_quant_mode(call: CombineCall) -> None:
    if call.comm_quant_mode not in (0, _INT8_TRANSPORT):
        raise ConstraintError("comm_quant_mode", call.comm_quant_mode, "must be 0 or 2", "use 2 for int8 transport")


def check_tensor_dims(call: CombineCall) -> None:
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("assist_info_for_combine", call.assist_info_for_combine, (1,), "(128·rows,)")
    check_dims("ep_send_counts", call.ep_send_counts, (1,), "(ep_world_size·local experts,)")
    check_dims("expert_scales", call.expert_scales, (2,), "(tokens, top_k)")
    if isinstance(call, AddRmsNormCall):
        check_dims("residual_x", call.residual_x, (3,), "(tokens, 1, hidden)")
        check_dims("gamma", call.gamma, (1, 3), "(hidden,) or (tokens, 1, hidden)")
    check_dims("ori_x", call.ori_x, (2,), "(tokens, hidden)")
    for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
        check_dims(name, getattr(call, name), (2,), "(const_expert_num, hidden)")
    if call.tp_send_counts is None and (call.tp_world_size == 2 or call.limits.tp_send_counts_needed):
        raise ConstraintError(
            "tp_send_counts", None, "must be given, although it is declared optional", "pass dispatch's tp_recv_counts"
        )
    check_dims("tp_send_counts", call.tp_send_counts, (1,), "(tp_world_size,)")
    check_dims("x_active_mask", call.x_active_mask, (1, 2), "(tokens,) or (tokens, top_k)")
    check_dims("elastic_info", call.elastic_info, (1,), "(4 + 2·ep_world_size,)")
    for name in ("activation_scale", "weight_scale", "group_list"):
        check_absent(name, getattr(call, name), "pass None, it is reserved")
    check_dims("shared_expert_x", call.shared_expert_x, (2, 3), "(tokens, hidden) or (a, b, hidden) with a·b tokens")
    assert isinstance(call.expand_x, TensorSpec)
    assert isinstance(call.expert_ids, TensorSpec)
    call.hidden = call.expand_x.shape[1]
    call.tokens, call.top_k = call.expert_ids.shape


def check_dtypes(call: CombineCall) -> None:
    """Tokens have expand_x's dtype everywhere: outside the operator's list is 161002, another of the list 561002."""
    assert isinstance(call.expand_x, TensorSpec)
    dtype = call.expand_x.dtype
    add_rms_norm = isinstance(call, AddRmsNormCall)
    if dtype == "int32" and not add_rms_norm:  # in the operator's list, then refused by tiling (§3.2)
        raise ConstraintError(
            "expand_x", call.expand_x, "must not be int32, although it is declared", "convert it to bfloat16"
        )
    quantity = "rms_norm_dtypes" if add_rms_norm else "token_dtypes"
    supported: tuple[str, ...] = getattr(call.limits, quantity)
    call.limits.check_dtype(quantity, dtype, "expand_x", call.expand_x)
    check_dtype("expert_ids", call.expert_ids, ("int32",))
    check_dtype("assist_info_for_combine", call.assist_info_for_combine, ("int32",))
    check_dtype("ep_send_counts", call.ep_send_counts, ("int32",))
    check_dtype("expert_scales", call.expert_scales, ("float32",))
    check_dtype("tp_send_counts", call.tp_send_counts, ("int32",))
    check_dtype("x_active_mask", call.x_active_mask, ("bool",))
    check_dtype("expand_scales", call.expand_scales, ("float32",))
    check_dtype("elastic_info", call.elastic_info, ("int32",))
    names = ("shared_expert_x", "ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v", "x_out")
    if isinstance(call, AddRmsNormCall):
        check_dtype("rstd_out", call.rstd_out, ("float32",))
        names = ("residual_x", "gamma", *names, "y_out")
    for name in names:
        spec: Output = getattr(call, name)
        check_dtype(name, spec, supported)
        check_dtype_of(name, spec, dtype, "expand_x's")


def check_virtual_inputs_given(call: CombineCall) -> None:
    if (call.copy_expert_num > 0 or call.const_expert_num > 0) and call.ori_x is None:
        raise ConstraintError("ori_x", None, "must be given for copy and const experts", "pass the tokens themselves")
    if call.const_expert_num > 0:
        for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
            if getattr(call, name) is None:
                raise ConstraintError(name, None, "must be given for const experts", "pass their parameters")


def check_rows(call: CombineCall) -> None:
    rows = call.layout.capacity * _tp_factor(call)
    check_length("expand_x", call.expand_x, rows, "the rows that dispatch makes room for")


def check_dispatch_outputs(call: CombineCall) -> None:
    layout = call.layout
    counts = layout.ep * layout.local_experts * _tp_factor(call)
    check_length("assist_info_for_combine", call.assist_info_for_combine, 128 * layout.capacity, "128 per row")
    check_length("ep_send_counts", call.ep_send_counts, counts, "one per local expert, source and TP rank")
    check_shape("tp_send_counts", call.tp_send_counts, (layout.tp,), "one per TP rank")


def _tp_factor(call: CombineCall) -> int:
    return call.tp_world_size if call.limits.lengths_times_tp else max(call.tp_world_size, 1)


def check_shared_expert_x(call: CombineCall) -> None:
    spec = call.shared_expert_x
    if spec is None:
        return
    if call.shared_expert_rank_num != 0:
        raise ConstraintError(
            "shared_expert_x",
            spec,
            f"must be None when shared_expert_rank_num is {call.shared_expert_rank_num}",
            "let either this tensor or the ranks of shared experts add them",
        )
    *rows, width = spec.shape
    tokens = rows[0] if len(rows) == 1 else rows[0] * rows[1]
    if tokens != call.tokens or width != call.hidden or min(rows) < 0:
        raise ConstraintError(
            "shared_expert_x",
            spec,
            f"must be ({call.tokens}, {call.hidden}), or (a, b, {call.hidden}) with a·b = {call.tokens}",
            "give it one row per token",
        )


def check_norm_and_out(call: CombineCall) -> None:
    if not isinstance(call, AddRmsNormCall):
        check_shape("x_out", call.x_out, (call.tokens, call.hidden), "one row per token")
        return
    shape = (call.tokens, 1, call.hidden)
    check_shape("residual_x", call.residual_x, shape, "one row per token")
    assert isinstance(call.gamma, TensorSpec)
    if call.gamma.shape not in ((call.hidden,), shape):
        raise ConstraintError(
            "gamma", call.gamma, f"must be ({call.hidden},), or {shape}", "pass one weight per hidden column"
        )
    check_shape("y_out", call.y_out, shape, "one row per token")
    check_shape("rstd_out", call.rstd_out, (call.tokens, 1, 1), "one number per token")
    check_shape("x_out", call.x_out, shape, "one row per token")


def check_virtual_inputs_shape(call: CombineCall) -> None:
    check_shape("ori_x", call.ori_x, (call.tokens, call.hidden), "one row per token")
    for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
        check_shape(name, getattr(call, name), (call.const_expert_num, call.hidden), "one row per const expert")
