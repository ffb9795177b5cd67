"""What MoeDistributeDispatchV2 accepts (specification §2.2 to §2.4, §2.9 to §2.13)."""

from __future__ import annotations

from evenmoe.contract import comm_alg
from evenmoe.contract import distribute as common
from evenmoe.contract.calls import DispatchCall, with_integers
from evenmoe.contract.distribute import INTEGER_ATTRIBUTES, Sizes
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import (
    TensorSpec,
    check_dims,
    check_dtype,
    check_dtype_of,
    check_given,
    check_length,
    check_shape,
)
from evenmoe.errors import MissingArgumentError, require

_NO_QUANT, _STATIC_QUANT, _DYNAMIC_QUANT = 0, 1, 2
Call = DispatchCall[TensorSpec]


def check_dispatch_call(call: Call) -> Layout:
    """Checks one rank's call of dispatch, and derives its layout; of several mistakes the first of §2.13 is raised.

    Raises:
        MissingArgumentError: a null tensor or group name, or a group name of 128 characters or more.
        UnsupportedTypeError: a dtype that the operator does not take.
        ConstraintError: everything else.

    Eight ranks with one expert each, 8 tokens on every rank, each for 3 experts: at most 64 rows for the expert here.

    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> call = DispatchCall(
    ...     x=TensorSpec((8, 7168), "bfloat16"), expert_ids=TensorSpec((8, 3), "int32"),
    ...     group_ep="ep", ep_world_size=8, ep_rank_id=0, moe_expert_num=8)
    >>> check_dispatch_call(call).capacity
    64
    """
    check_wrapper(call)
    return check_tiling(call)


def check_wrapper(call: DispatchCall[TensorSpec], rows: str = "assist_info_for_combine") -> None:
    """What the aclnn wrapper looks at: null pointers and the lengths of the group names.

    `rows` is the output by which combine finds the rows.
    """
    check_given("x", call.x, "pass the tokens of this rank")
    check_given("expert_ids", call.expert_ids, "pass the physical experts of every token")
    outputs = ("expand_x", rows, "expert_token_nums", "ep_recv_counts", "tp_recv_counts")
    for name in outputs if common.tp_examined(call) else outputs[:-1]:
        check_given(name, getattr(call, name), "pass a tensor for this output")
    common.check_group_given(call)
    if call.quant_mode == _DYNAMIC_QUANT:
        check_given("dynamic_scales", call.dynamic_scales, "pass a tensor for this output of quant_mode 2")
    common.check_group_lengths(call, MissingArgumentError)


def check_tiling(call: Call) -> Layout:
    """Everything else, in the order of §2.13."""
    call = with_integers(call, (*INTEGER_ATTRIBUTES, "quant_mode", "expert_token_nums_type"))
    common.check_virtual_experts(call)
    common.check_ranks(call)
    common.check_expert_numbers(call)
    check_modes(call)
    sizes = check_tensor_dims(call)
    check_dtypes(call)
    common.check_shared_pair(call)
    comm_alg.check_restrictions(call, sizes)
    common.check_experts_on_ranks(call)
    common.check_tokens(call, sizes, "x")
    if not comm_alg.is_hierarchy(call):  # which has bounds of its own
        common.check_hidden(call, sizes, "x")
    rule = f"must have one row for each of the {sizes.tokens} tokens of x"
    require(call.expert_ids.shape[0] == sizes.tokens, "expert_ids", call.expert_ids, rule, "match them")
    common.check_top_k(call, sizes)
    common.check_mask_shape(call, sizes)  # §2.13 does not say where; here both sizes that it needs are sound
    rows = call.shared_experts + call.moe_expert_num
    check_shape("scales", call.scales, (rows, sizes.hidden), "one row for each shared and each physical expert")
    common.check_elastic_shape(call)
    layout = common.layout_of(call, sizes)
    check_outputs(call, layout)
    check_expert_scales(call, layout)
    common.check_performance_info(call)
    full_mesh_v2 = call.comm_alg == comm_alg.FULL_MESH_V2
    common.check_buffer(call, layout, full_mesh_v2, hierarchy=comm_alg.is_hierarchy(call))
    return layout


def check_modes(call: Call) -> None:
    quant, scales = call.quant_mode, call.scales
    modes = (_NO_QUANT, _STATIC_QUANT, _DYNAMIC_QUANT)
    require(quant in modes, "quant_mode", quant, "must be 0 or 2", "use 0 for rows as they are, 2 for int8")
    check_token_nums_type(call)
    comm_alg.check_known(call)
    # In the range above, yet an error on Atlas A3 (§2.8).
    rule = "must be 0 or 2, static quantisation is not supported"
    require(quant != _STATIC_QUANT, "quant_mode", 1, rule, "use 2 for int8")
    rule, fix = "must be None under quant_mode 0", "drop it, or use quant_mode=2"
    require(quant != _NO_QUANT or scales is None, "scales", scales, rule, fix)


def check_token_nums_type(call: Call) -> None:
    kind = call.expert_token_nums_type
    require(kind in (0, 1), "expert_token_nums_type", kind, "must be 0 or 1", "use 1 for counts, 0 for sums")


def check_tensor_dims(call: Call) -> Sizes:
    check_dims("x", call.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("scales", call.scales, (2,), "(shared and physical experts, hidden)")
    check_dims("x_active_mask", call.x_active_mask, (1, 2), "(tokens,) or (tokens, top_k)")
    check_dims("elastic_info", call.elastic_info, (1,), "(4 + 2·ep_world_size,)")
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    if call.quant_mode == _DYNAMIC_QUANT:
        check_dims("dynamic_scales", call.dynamic_scales, (1,), "(rows,)")
    check_dims("assist_info_for_combine", call.assist_info_for_combine, (1,), "(128·rows,)")
    check_dims("expert_token_nums", call.expert_token_nums, (1,), "(local experts,)")
    check_dims("ep_recv_counts", call.ep_recv_counts, (1,), "(ep_world_size·local experts,)")
    check_dims("tp_recv_counts", call.tp_recv_counts, (1,), "(tp_world_size,)")
    return Sizes(call.x.shape[0], call.x.shape[1], call.expert_ids.shape[1])


def check_dtypes(call: Call) -> None:
    call.limits.check_dtype("token_dtypes", call.x.dtype, "x", call.x)
    check_dtype("expert_ids", call.expert_ids, ("int32",))
    check_dtype("scales", call.scales, ("float32",))
    check_dtype("x_active_mask", call.x_active_mask, ("bool",))
    check_dtype("expert_scales", call.expert_scales, ("float32",))
    check_dtype("elastic_info", call.elastic_info, ("int32",))
    if isinstance(call.expand_x, TensorSpec):
        check_dtype("expand_x", call.expand_x, (*call.limits.token_dtypes, "int8"))
        sent = "int8" if call.quant_mode == _DYNAMIC_QUANT else call.x.dtype
        check_dtype_of("expand_x", call.expand_x, sent, f"what quant_mode {call.quant_mode} makes of x")
    check_dtype("dynamic_scales", call.dynamic_scales, ("float32",))
    check_dtype("assist_info_for_combine", call.assist_info_for_combine, ("int32",))
    check_dtype("expert_token_nums", call.expert_token_nums, ("int64",))
    check_dtype("ep_recv_counts", call.ep_recv_counts, ("int32",))
    check_dtype("tp_recv_counts", call.tp_recv_counts, ("int32",))
    check_dtype("expand_scales", call.expand_scales, ("float32",))


def check_outputs(call: Call, layout: Layout) -> None:
    """The outputs must have room for what may arrive (§2.3); where nothing is written, any shape will do."""
    if isinstance(call.expand_x, TensorSpec):
        check_length("expand_x", call.expand_x, layout.expand_x_rows, "the rows that may arrive")
        check_shape("expand_x", call.expand_x, (call.expand_x.shape[0], layout.hidden), "as wide as x")
    if call.quant_mode == _DYNAMIC_QUANT:
        check_length("dynamic_scales", call.dynamic_scales, layout.expand_x_rows, "one per row")
    # Dispatch fills three; the 128 that combine asks for are asked for here too since 2026 (§2.3).
    per_row = call.limits.assist_info_per_row
    meaning = "three per row" if per_row == 3 else f"{per_row} per row"
    check_length("assist_info_for_combine", call.assist_info_for_combine, per_row * layout.capacity, meaning)
    check_shape("expert_token_nums", call.expert_token_nums, (layout.local_experts,), "one per local expert")
    meaning = "one per local expert, source and TP rank"
    more = comm_alg.more_counts(layout, layout.top_k) if comm_alg.is_hierarchy(call) else 0
    check_length("ep_recv_counts", call.ep_recv_counts, layout.ep_recv_counts_length + more, meaning)
    if common.tp_examined(call):
        check_shape("tp_recv_counts", call.tp_recv_counts, (layout.tp,), "one per TP rank")


def check_expert_scales(call: Call, layout: Layout) -> None:
    """One weight per token and k, and room for one per row, where they are sent (§2.3)."""
    if not call.sends_expert_scales:
        return
    shape = (layout.num_tokens, layout.top_k)
    check_shape("expert_scales", call.expert_scales, shape, "one weight per token and k")
    if call.limits.expand_scales == "required":
        check_given("expand_scales", call.expand_scales, "pass a tensor for this output of expert_scales")
        check_dims("expand_scales", call.expand_scales, (1,), "(rows,)")
        check_length("expand_scales", call.expand_scales, layout.capacity, "one per row")


def infer_dispatch(layout: Layout, dtype: str, quant_mode: int, hierarchy: bool = False) -> dict[str, TensorSpec]:
    """The outputs that dispatch allocates (specification §5), by name, in the operator's order.

    Args:
        layout: from `check_dispatch_call`.
        dtype: of x.
        quant_mode: 0 or 2.
        hierarchy: whether comm_alg is "hierarchy", which asks for more counts.

    >>> from evenmoe.contract.layout import make_layout
    >>> layout = make_layout(ep=2, rank=0, num_experts=4, num_tokens=3, hidden=5, top_k=1)
    >>> for name, spec in infer_dispatch(layout, "float16", 2).items():
    ...     print(name, spec)
    expand_x int8 (6, 5)
    dynamic_scales float32 (6,)
    assist_info_for_combine int32 (768,)
    expert_token_nums int64 (2,)
    ep_recv_counts int32 (4,)
    tp_recv_counts int32 (0,)
    expand_scales float32 (6,)
    """
    sent, rows = "int8" if quant_mode == _DYNAMIC_QUANT else dtype, layout.expand_x_rows
    local_experts = (layout.original or layout).local_experts
    more = comm_alg.more_counts(layout.original or layout, layout.top_k) if hierarchy else 0
    assist_info = max(layout.num_tokens * layout.top_k, 128 * layout.capacity)
    return {
        "expand_x": TensorSpec((rows, layout.hidden), sent),
        "dynamic_scales": TensorSpec((rows,), "float32"),
        "assist_info_for_combine": TensorSpec((assist_info,), "int32"),
        "expert_token_nums": TensorSpec((local_experts,), "int64"),
        "ep_recv_counts": TensorSpec((layout.ep_recv_counts_length + more,), "int32"),
        "tp_recv_counts": TensorSpec((layout.tp,), "int32"),
        "expand_scales": TensorSpec((layout.capacity,), "float32"),
    }
