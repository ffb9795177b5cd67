"""What MoeDistributeDispatch and MoeDistributeCombine, the first versions, accept (specification §2.17, §3.8)."""

from __future__ import annotations

from dataclasses import replace

from evenmoe.contract import distribute as common
from evenmoe.contract.calls import CombineV1Call, DispatchV1Call, with_integers
from evenmoe.contract.combine import check_dtypes as check_combine_dtypes
from evenmoe.contract.combine import check_wrapper as check_combine_wrapper
from evenmoe.contract.dispatch import check_dtypes as check_dispatch_dtypes
from evenmoe.contract.dispatch import check_token_nums_type, infer_dispatch
from evenmoe.contract.dispatch import check_wrapper as check_dispatch_wrapper
from evenmoe.contract.distribute import INTEGER_ATTRIBUTES, Call, Sizes
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import (
    TensorSpec,
    check_absent,
    check_dims,
    check_dtype,
    check_given,
    check_length,
    check_shape,
)
from evenmoe.errors import require

_INT8_TRANSPORT = _DYNAMIC_QUANT = 2
_ALONE, _TOGETHER = 256, 144  # ranks of a world divide the one, or are whole multiples of the other


def check_dispatch_v1_call(call: DispatchV1Call[TensorSpec]) -> Layout:
    """Checks one rank's call of the first version of dispatch, and derives its layout.

    Raises:
        MissingArgumentError: a null tensor or group name, or a group name of 128 characters or more.
        UnsupportedTypeError: a dtype that the operator does not take.
        ConstraintError: everything else.

    Sixteen ranks, two of them for the shared expert: each gets its own 8 tokens, and half of those of the other 14.

    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> call = DispatchV1Call(
    ...     x=TensorSpec((8, 7168), "bfloat16"), expert_ids=TensorSpec((8, 3), "int32"), group_ep="ep",
    ...     ep_world_size=16, ep_rank_id=1, moe_expert_num=14, shared_expert_rank_num=2)
    >>> check_dispatch_v1_call(call).capacity
    64
    """
    check_dispatch_wrapper(call, rows="expand_idx")
    checked = with_integers(call, (*INTEGER_ATTRIBUTES, "quant_mode", "expert_token_nums_type"))
    return _check_dispatch_tiling(checked)


def _check_dispatch_tiling(call: DispatchV1Call[TensorSpec]) -> Layout:
    _check_attributes(call)
    quant = call.quant_mode
    require(
        quant in (0, _DYNAMIC_QUANT), "quant_mode", quant, "must be 0 or 2", "use 0 for rows as they are, 2 for int8"
    )
    check_token_nums_type(call)
    rule, fix = "must be None under quant_mode 0", "drop it, or use quant_mode=2"
    require(quant != 0 or call.scales is None, "scales", call.scales, rule, fix)
    check_dims("x", call.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("scales", call.scales, (2,), "(shared and physical experts, hidden)")
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    if quant == _DYNAMIC_QUANT:
        check_dims("dynamic_scales", call.dynamic_scales, (1,), "(rows,)")
    check_dims("expand_idx", call.expand_idx, (1,), "(tokens·top_k,)")
    check_dims("expert_token_nums", call.expert_token_nums, (1,), "(local experts,)")
    check_dims("ep_recv_counts", call.ep_recv_counts, (1,), "(ep_world_size·local experts,)")
    check_dims("tp_recv_counts", call.tp_recv_counts, (1,), "(tp_world_size,)")
    check_dispatch_dtypes(call)
    check_dtype("expand_idx", call.expand_idx, ("int32",))
    sizes = Sizes(call.x.shape[0], call.x.shape[1], call.expert_ids.shape[1])
    layout = _check_sizes(call, sizes, "x")
    rule = f"must have one row for each of the {sizes.tokens} tokens of x"
    require(call.expert_ids.shape[0] == sizes.tokens, "expert_ids", call.expert_ids, rule, "match them")
    if call.limits.expand_scales == "required":
        shape = (sizes.tokens, sizes.top_k)
        check_shape("expert_scales", call.expert_scales, shape, "one weight per token and k, though none is sent")
    rows = call.shared_experts + call.moe_expert_num
    check_shape("scales", call.scales, (rows, sizes.hidden), "one row for each shared and each physical expert")
    _check_dispatch_outputs(call, layout)
    return layout


def _check_dispatch_outputs(call: DispatchV1Call[TensorSpec], layout: Layout) -> None:
    check_length("expand_x", call.expand_x, layout.expand_x_rows, "the rows that may arrive")
    if isinstance(call.expand_x, TensorSpec):
        check_shape("expand_x", call.expand_x, (call.expand_x.shape[0], layout.hidden), "as wide as x")
    if call.quant_mode == _DYNAMIC_QUANT:
        check_length("dynamic_scales", call.dynamic_scales, layout.expand_x_rows, "one per row")
    check_shape("expand_idx", call.expand_idx, (layout.num_tokens * layout.top_k,), "one per token and k")
    check_shape("expert_token_nums", call.expert_token_nums, (layout.local_experts,), "one per local expert")
    meaning = "one per local expert, source and TP rank"
    check_length("ep_recv_counts", call.ep_recv_counts, layout.ep_recv_counts_length, meaning)
    if common.tp_examined(call):
        check_shape("tp_recv_counts", call.tp_recv_counts, (layout.tp,), "one per TP rank")


def check_combine_v1_call(call: CombineV1Call[TensorSpec]) -> Layout:
    """Checks one rank's call of the first version of combine, and derives its layout.

    Raises:
        MissingArgumentError: a null tensor or group name.
        UnsupportedTypeError: a dtype that the operator does not take, or a group name of 128 characters or more.
        ConstraintError: everything else.

    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> call = CombineV1Call(
    ...     expand_x=TensorSpec((64, 7168), "bfloat16"), expert_ids=TensorSpec((8, 3), "int32"),
    ...     expand_idx=TensorSpec((23,), "int32"), ep_send_counts=TensorSpec((8,), "int32"),
    ...     expert_scales=TensorSpec((8, 3), "float32"), group_ep="ep", ep_world_size=8, ep_rank_id=0, moe_expert_num=8)
    >>> check_combine_v1_call(call)
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `expand_idx` is int32 (23,): it must have the shape (24,), one per token and k; \
give it the shape (24,).
    """
    check_combine_wrapper(call, rows="expand_idx")
    checked = with_integers(call, (*INTEGER_ATTRIBUTES, "comm_quant_mode"))
    return _check_combine_tiling(checked)


def _check_combine_tiling(call: CombineV1Call[TensorSpec]) -> Layout:
    _check_attributes(call)
    quant = call.comm_quant_mode
    require(quant in (0, _INT8_TRANSPORT), "comm_quant_mode", quant, "must be 0 or 2", "use 2 for int8 transport")
    rule, fix = "must be 0 when tp_world_size is 2", "use 0, or no TP"
    require(call.tp_world_size != 2 or quant == 0, "comm_quant_mode", quant, rule, fix)
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("expand_idx", call.expand_idx, (1,), "(tokens·top_k,)")
    check_dims("ep_send_counts", call.ep_send_counts, (1,), "(ep_world_size·local experts,)")
    check_dims("expert_scales", call.expert_scales, (2,), "(tokens, top_k)")
    if common.tp_examined(call):
        check_given("tp_send_counts", call.tp_send_counts, "pass dispatch's tp_recv_counts")
        check_dims("tp_send_counts", call.tp_send_counts, (1,), "(tp_world_size,)")
    for name in ("activation_scale", "weight_scale", "group_list"):
        check_absent(name, getattr(call, name), "pass None, it is reserved")
    check_absent("shared_expert_x", call.shared_expert_x, "add it afterwards, the operator does not")
    check_combine_dtypes(call)
    check_dtype("expand_idx", call.expand_idx, ("int32",))
    sizes = Sizes(call.expert_ids.shape[0], call.expand_x.shape[1], call.expert_ids.shape[1])
    layout = _check_sizes(call, sizes, "expert_ids")
    tp = call.tp_world_size if call.limits.lengths_times_tp else max(call.tp_world_size, 1)
    check_length("expand_x", call.expand_x, layout.capacity * tp, "the rows that dispatch makes room for")
    check_shape("expand_idx", call.expand_idx, (sizes.tokens * sizes.top_k,), "one per token and k")
    counts, meaning = layout.ep * layout.local_experts * tp, "one per local expert, source and TP rank"
    check_length("ep_send_counts", call.ep_send_counts, counts, meaning)
    if common.tp_examined(call):
        check_shape("tp_send_counts", call.tp_send_counts, (layout.tp,), "one per TP rank")
    check_shape("expert_scales", call.expert_scales, (sizes.tokens, sizes.top_k), "one weight per token and k")
    check_shape("x_out", call.x_out, (sizes.tokens, sizes.hidden), "one row per token")
    return layout


def _check_attributes(call: Call) -> None:
    """The numbers of ranks and experts, but for how they go together with the tensors."""
    ep, limits, shared, experts = call.ep_world_size, call.limits, call.shared_expert_num, call.moe_expert_num
    limits.check("v1_ep_world_size", ep, "ep_world_size", ep, "must be {}", "use {} ranks")
    if limits.v1_ep_world_size.step > 1:
        rule = f"must divide {_ALONE} or be a multiple of {_TOGETHER}"
        require(_ALONE % ep == 0 or ep % _TOGETHER == 0, "ep_world_size", ep, rule, "use another number of ranks")
    common.check_tp_and_ranks(call)
    shard = call.expert_shard_type
    require(shard == 0, "expert_shard_type", shard, "must be 0, shared experts on the first ranks", "use 0")
    common.check_shared_rank_num(call)
    limits.check("v1_physical_experts", experts, "moe_expert_num", experts, "must be {}", "use {} physical experts")
    require(
        shared == 1, "shared_expert_num", shared, "must be 1 in the first version", "use 1, also without ranks for it"
    )


def _check_sizes(call: Call, sizes: Sizes, argument: str) -> Layout:
    """How attributes and tensors' sizes go together; the layout, with the first version's capacity on shared ranks."""
    ep, shared_ranks, limits = call.ep_world_size, call.shared_expert_rank_num, call.limits
    rule = f"must divide ep_world_size {ep}, so that every rank for the shared expert gets as many tokens"
    fits = shared_ranks == 0 or ep % shared_ranks == 0
    require(fits, "shared_expert_rank_num", shared_ranks, rule, f"use a divisor of {ep}")
    common.check_experts_on_ranks(call)
    plain = replace(call, x_active_mask=None)  # which is not looked at
    common.check_tokens(plain, sizes, argument)
    hidden, top_k = sizes.hidden, sizes.top_k
    wide = "x" if argument == "x" else "expand_x"
    limits.check("v1_hidden", hidden, wide, f"of width {hidden}", "must have {} columns", "use a hidden size of {}")
    rule, fix = "must have {} columns", "use {} experts per token"
    limits.check("v1_top_k", top_k, "expert_ids", f"of {top_k} columns", rule, fix)
    rule = f"must have at most {call.moe_expert_num} columns, one per expert"
    enough = top_k <= call.moe_expert_num
    require(enough, "expert_ids", f"of {top_k} columns", rule, "route a token to each expert once at most")
    layout = common.layout_of(call, sizes)
    return replace(layout, capacity=layout.global_bs // shared_ranks) if layout.is_shared else layout


def infer_dispatch_v1(layout: Layout, dtype: str, quant_mode: int) -> dict[str, TensorSpec]:
    """The outputs that the first version of dispatch allocates (specification §5), by name, in the operator's order.

    >>> from evenmoe.contract.layout import make_layout
    >>> layout = make_layout(ep=2, rank=0, num_experts=4, num_tokens=3, hidden=5, top_k=1)
    >>> list(infer_dispatch_v1(layout, "float16", 0).items())[2]
    ('expand_idx', TensorSpec(shape=(3,), dtype='int32'))
    """
    specs = infer_dispatch(layout, dtype, quant_mode)
    expand_idx = TensorSpec((layout.num_tokens * layout.top_k,), "int32")
    return dict(
        ("expand_idx", expand_idx) if name == "assist_info_for_combine" else (name, spec)
        for name, spec in specs.items()
    )
