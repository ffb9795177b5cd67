"""What MoeDistributeCombineV2 and MoeDistributeCombineAddRmsNorm accept (specification §3.2, §3.6, §4).

The second is the first with a residual and a norm behind it, so it is checked by the same sequence: where the two
differ, the call object says so.
"""

from __future__ import annotations

from math import prod

from evenmoe.contract import comm_alg
from evenmoe.contract import distribute as common
from evenmoe.contract.calls import AddRmsNormCall, CombineCall, Output, with_integers
from evenmoe.contract.distribute import INTEGER_ATTRIBUTES, Sizes
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import (
    TensorSpec,
    check_absent,
    check_dims,
    check_dtype,
    check_dtype_of,
    check_given,
    check_length,
    check_shape,
)
from evenmoe.errors import UnsupportedTypeError, require

_INT8_TRANSPORT = 2
_CONST_INPUTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
Call = CombineCall[TensorSpec]


def check_combine_call(call: Call) -> Layout:
    """Checks one rank's call of either operator, and derives its layout; the first mistake of §3.6 is raised.

    In an `AddRmsNormCall` a virtual expert number is an error only when it is −1 (specification §4).

    Raises:
        MissingArgumentError: a null tensor or group name.
        UnsupportedTypeError: a dtype that the operator does not take, or a group name of 128 characters or more.
        ConstraintError: everything else.

    Eight ranks with one expert each, 8 tokens on every rank, each for 3 experts:

    >>> from evenmoe.contract.limits import RELAXED
    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> given = {
    ...     "expand_x": TensorSpec((64, 7168), "bfloat16"), "expert_ids": TensorSpec((8, 3), "int32"),
    ...     "assist_info_for_combine": TensorSpec((8192,), "int32"), "ep_send_counts": TensorSpec((8,), "int32"),
    ...     "expert_scales": TensorSpec((8, 3), "float32"),
    ...     "group_ep": "ep", "ep_world_size": 8, "ep_rank_id": 0, "moe_expert_num": 8, "limits": RELAXED}
    >>> layout = check_combine_call(CombineCall(**given))
    >>> layout.num_tokens, layout.hidden
    (8, 7168)
    >>> check_combine_call(AddRmsNormCall(**given, residual_x=None, gamma=TensorSpec((7168,), "bfloat16")))
    Traceback (most recent call last):
    evenmoe.errors.MissingArgumentError: `residual_x` is None: it must be given; pass what is added before the norm.
    """
    check_wrapper(call)
    if isinstance(call, AddRmsNormCall):  # the wrapper lets these pass, so they come after the group names (§4, §10)
        check_given("residual_x", call.residual_x, "pass what is added before the norm")
        check_given("gamma", call.gamma, "pass the norm's weight")
        check_given("y_out", call.y_out, "pass a tensor for this output")
        check_given("rstd_out", call.rstd_out, "pass a tensor for this output")
    return check_tiling(call)


def check_wrapper(call: CombineCall[TensorSpec], rows: str = "assist_info_for_combine") -> None:
    """What the aclnn wrapper looks at: null pointers and the lengths of the group names.

    `rows` is dispatch's output by which the rows are found.
    """
    check_given("expand_x", call.expand_x, "pass the experts' outputs in dispatch's row order")
    check_given("expert_ids", call.expert_ids, "pass the ids that dispatch was called with")
    check_given(rows, getattr(call, rows), "pass dispatch's output of this name")
    check_given("ep_send_counts", call.ep_send_counts, "pass dispatch's ep_recv_counts")
    check_given("expert_scales", call.expert_scales, "pass the gate weights")
    check_given("x_out", call.x_out, "pass a tensor for this output")
    common.check_group_given(call)
    common.check_group_lengths(call, UnsupportedTypeError)


def check_tiling(call: Call) -> Layout:
    """Everything else, in the order of §3.6."""
    call = with_integers(call, (*INTEGER_ATTRIBUTES, "comm_quant_mode"))
    quant = call.comm_quant_mode
    check_virtual_experts(call)
    common.check_ranks(call)
    rule, fix = "must be 0 when tp_world_size is 2", "use 0, or no TP"
    require(call.tp_world_size != 2 or quant == 0, "comm_quant_mode", quant, rule, fix)
    common.check_expert_numbers(call)
    require(quant in (0, _INT8_TRANSPORT), "comm_quant_mode", quant, "must be 0 or 2", "use 2 for int8 transport")
    sizes = check_tensor_dims(call)
    check_dtypes(call)
    common.check_shared_pair(call)
    comm_alg.check_restrictions(call, sizes)
    common.check_experts_on_ranks(call)
    common.check_tokens(call, sizes, "expert_ids")
    check_virtual_inputs_given(call)
    common.check_top_k(call, sizes)
    common.check_elastic_shape(call)
    layout = common.layout_of(call, sizes)
    tp = call.tp_world_size if call.limits.lengths_times_tp else max(call.tp_world_size, 1)
    check_length("expand_x", call.expand_x, layout.capacity * tp, "the rows that dispatch makes room for")
    if not comm_alg.is_hierarchy(call):  # which has bounds of its own
        common.check_hidden(call, sizes, "expand_x")
    check_length("assist_info_for_combine", call.assist_info_for_combine, 128 * layout.capacity, "128 per row")
    counts, meaning = layout.ep * layout.local_experts * tp, "one per local expert, source and TP rank"
    check_length("ep_send_counts", call.ep_send_counts, counts, meaning)
    comm_alg.check_combine_lengths(call, layout)
    if common.tp_examined(call):
        check_shape("tp_send_counts", call.tp_send_counts, (layout.tp,), "one per TP rank")
    check_shape("expert_scales", call.expert_scales, (sizes.tokens, sizes.top_k), "one weight per token and k")
    common.check_mask_shape(call, sizes)
    check_shared_expert_x(call, sizes)
    check_norm_and_out(call, sizes)
    check_shape("ori_x", call.ori_x, (sizes.tokens, sizes.hidden), "one row per token")
    check_const_shapes(call, sizes)
    common.check_performance_info(call)
    common.check_buffer(call, layout, hierarchy=comm_alg.is_hierarchy(call))
    return layout


def check_const_shapes(call: Call, sizes: Sizes) -> None:
    """Each const expert has a row of each; alphas of one dimension have a number (§3.4)."""
    for name in _CONST_INPUTS:
        spec: TensorSpec | None = getattr(call, name)
        if spec is not None and len(spec.shape) == 1:
            check_shape(name, spec, (call.const_expert_num,), "one factor per const expert")
        else:
            check_shape(name, spec, (call.const_expert_num, sizes.hidden), "one row per const expert")
    first, second = call.const_expert_alpha_1, call.const_expert_alpha_2
    if first is not None and second is not None:
        rule = f"must have as many dimensions as const_expert_alpha_1, which is {first}"
        alike = len(first.shape) == len(second.shape)
        require(alike, "const_expert_alpha_2", second, rule, "pass both as rows, or both as factors")


def check_virtual_experts(call: Call) -> None:
    if not isinstance(call, AddRmsNormCall):
        return common.check_virtual_experts(call)
    for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
        require(getattr(call, name) != -1, name, -1, "must not be -1", "use 0 for none")
    common.check_sum_of_experts(call)


def check_tensor_dims(call: Call) -> Sizes:
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("assist_info_for_combine", call.assist_info_for_combine, (1,), "(128·rows,)")
    check_dims("ep_send_counts", call.ep_send_counts, (1,), "(ep_world_size·local experts,)")
    check_dims("expert_scales", call.expert_scales, (2,), "(tokens, top_k)")
    if isinstance(call, AddRmsNormCall):
        check_dims("residual_x", call.residual_x, (3,), "(tokens, 1, hidden)")
        check_dims("gamma", call.gamma, (1, 3), "(hidden,) or (tokens, 1, hidden)")
    check_dims("ori_x", call.ori_x, (2,), "(tokens, hidden)")
    for name in _CONST_INPUTS:
        dims = call.limits.const_alpha_dims if name != "const_expert_v" else (2,)
        check_dims(name, getattr(call, name), dims, "(const_expert_num, hidden)")
    if common.tp_examined(call):
        rule, fix = "must be given, although it is declared optional", "pass dispatch's tp_recv_counts"
        require(call.tp_send_counts is not None, "tp_send_counts", None, rule, fix)
        check_dims("tp_send_counts", call.tp_send_counts, (1,), "(tp_world_size,)")
    check_dims("x_active_mask", call.x_active_mask, (1, 2), "(tokens,) or (tokens, top_k)")
    check_dims("elastic_info", call.elastic_info, (1,), "(4 + 2·ep_world_size,)")
    for name in ("activation_scale", "weight_scale", "group_list"):
        check_absent(name, getattr(call, name), "pass None, it is reserved")
    check_dims("shared_expert_x", call.shared_expert_x, (2, 3), "(tokens, hidden) or (a, b, hidden) with a·b tokens")
    tokens, top_k = call.expert_ids.shape
    return Sizes(tokens, call.expand_x.shape[1], top_k)


def check_dtypes(call: Call) -> None:
    """Tokens have expand_x's dtype everywhere: outside the operator's list is 161002, another of the list 561002."""
    dtype = call.expand_x.dtype
    add_rms_norm = isinstance(call, AddRmsNormCall)
    # In combine's list, then an error of tiling (§3.2).
    rule, fix = "must not be int32, although it is declared", "convert it to bfloat16"
    require(dtype != "int32" or add_rms_norm, "expand_x", call.expand_x, rule, fix)
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
    names = ("shared_expert_x", "ori_x", *_CONST_INPUTS, "x_out")
    if isinstance(call, AddRmsNormCall):
        check_dtype("rstd_out", call.rstd_out, ("float32",))
        names = ("residual_x", "gamma", *names, "y_out")
    for name in names:
        spec: Output[TensorSpec] = getattr(call, name)
        check_dtype(name, spec, supported)
        check_dtype_of(name, spec, dtype, "expand_x's")


def check_virtual_inputs_given(call: Call) -> None:
    needed = call.copy_expert_num > 0 or call.const_expert_num > 0
    rule, fix = "must be given for copy and const experts", "pass the tokens themselves"
    require(not needed or call.ori_x is not None, "ori_x", None, rule, fix)
    for name in _CONST_INPUTS:
        given = call.const_expert_num <= 0 or getattr(call, name) is not None
        require(given, name, None, "must be given for const experts", "pass their parameters")


def check_shared_expert_x(call: Call, sizes: Sizes) -> None:
    spec, ranks = call.shared_expert_x, call.shared_expert_rank_num
    if spec is None:
        return
    rule = f"must be None when shared_expert_rank_num is {ranks}"
    fix = "let either this tensor or the ranks of shared experts add them"
    require(ranks == 0, "shared_expert_x", spec, rule, fix)
    *rows, width = spec.shape
    fits = prod(rows) == sizes.tokens and width == sizes.hidden and min(rows) >= 0
    rule = f"must be ({sizes.tokens}, {sizes.hidden}), or (a, b, {sizes.hidden}) with a·b = {sizes.tokens}"
    require(fits, "shared_expert_x", spec, rule, "give it one row per token")


def check_norm_and_out(call: Call, sizes: Sizes) -> None:
    if not isinstance(call, AddRmsNormCall):
        check_shape("x_out", call.x_out, (sizes.tokens, sizes.hidden), "one row per token")
        return
    shape = (sizes.tokens, 1, sizes.hidden)
    check_shape("residual_x", call.residual_x, shape, "one row per token")
    rule = f"must be ({sizes.hidden},), or {shape}"
    known = call.gamma.shape in ((sizes.hidden,), shape)
    require(known, "gamma", call.gamma, rule, "pass one weight per hidden column")
    check_shape("y_out", call.y_out, shape, "one row per token")
    check_shape("rstd_out", call.rstd_out, (sizes.tokens, 1, 1), "one number per token")
    check_shape("x_out", call.x_out, shape, "one row per token")
