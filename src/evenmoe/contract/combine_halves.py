"""What MoeDistributeCombineSetup and MoeDistributeCombineTeardown accept (specification §14.2)."""

from __future__ import annotations

from typing import cast

from evenmoe.contract import halves
from evenmoe.contract.half_calls import CombineSetupCall, CombineTeardownCall
from evenmoe.contract.halves import HalfSizes
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import (
    Spec,
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

Setup = CombineSetupCall[TensorSpec]
Teardown = CombineTeardownCall[TensorSpec]
#: What the host code of Ascend 950 takes: nothing between.
_RANKS, _EXPERTS, _TOKENS, _HIDDEN, _TOP_K = (2, 4, 8), (32,), (8, 16, 256), (4096, 7168), (6, 8)


def check_combine_setup_call(call: Setup) -> Layout:
    """Checks one rank's setup of combine, and derives its layout; the first mistake of §14.2 is raised.

    Raises:
        MissingArgumentError: a null tensor or group name.
        UnsupportedTypeError: a dtype that the operator does not take, a tensor without elements, or a group name of 128
            characters or more.
        ConstraintError: everything else.
    """
    check_given("expand_x", call.expand_x, "pass the experts' outputs in dispatch's row order")
    check_given("expert_ids", call.expert_ids, "pass the ids that dispatch was called with")
    check_given("assist_info_for_combine", call.assist_info_for_combine, "pass what dispatch's teardown gave")
    halves.check_outputs_given({"quant_expand_x": call.quant_expand_x, "comm_cmd_info": call.comm_cmd_info})
    if call.of_the_chip:
        for name in ("expand_x", "expert_ids", "assist_info_for_combine", "quant_expand_x", "comm_cmd_info"):
            _check_not_empty(name, getattr(call, name))
    halves.check_group(call)
    call = cast(Setup, halves.whole_numbers(call, "comm_quant_mode"))
    _check_attributes(call)
    _check_rows(call)
    check_dtype("assist_info_for_combine", call.assist_info_for_combine, ("int32",))
    check_dims("assist_info_for_combine", call.assist_info_for_combine, (1,), "(128·rows,)")
    sizes = _sizes(call)
    layout = _layout(call, sizes)
    rows = call.expand_x.shape[0]
    check_shape("assist_info_for_combine", call.assist_info_for_combine, (128 * rows,), "128 per row of expand_x")
    _check_between(call, layout)
    return layout


def check_combine_teardown_call(call: Teardown) -> Layout:
    """As `check_combine_setup_call`, of the teardown."""
    check_given("expand_x", call.expand_x, "pass what the setup was called with")
    check_given("quant_expand_x", call.quant_expand_x, "pass what the setup gave")
    check_given("expert_ids", call.expert_ids, "pass the ids that dispatch was called with")
    check_given("expand_idx", call.expand_idx, "pass what dispatch's setup gave")
    check_given("expert_scales", call.expert_scales, "pass the gate weights")
    check_given("comm_cmd_info", call.comm_cmd_info, "pass what the setup gave")
    halves.check_outputs_given({"x_out": call.x_out})
    halves.check_group(call)
    call = cast(Teardown, halves.whole_numbers(call, "comm_quant_mode"))
    _check_attributes(call)
    check_absent("shared_expert_x", call.shared_expert_x, "add it to the result; the published kernel does not")
    _check_rows(call)
    check_dtype("expand_idx", call.expand_idx, ("int32",))
    check_dtype("expert_scales", call.expert_scales, ("float32",))
    check_dtype("x_active_mask", call.x_active_mask, ("bool",))
    check_dtype("x_out", call.x_out, call.limits.token_dtypes)
    check_dtype_of("x_out", call.x_out, call.expand_x.dtype, "expand_x's")
    check_dims("expand_idx", call.expand_idx, (1,), "(tokens·top_k,)")
    check_dims("expert_scales", call.expert_scales, (2,), "(tokens, top_k)")
    check_dims("x_active_mask", call.x_active_mask, (1,), "(tokens,)")
    check_dims("x_out", call.x_out, (2,), "(tokens, hidden)")
    sizes = _sizes(call)
    layout = _layout(call, sizes)
    check_shape("x_out", call.x_out, (sizes.tokens, sizes.hidden), "one row per token")
    check_shape("expert_scales", call.expert_scales, (sizes.tokens, sizes.top_k), "one weight per token and k")
    check_shape("expand_idx", call.expand_idx, (sizes.tokens * sizes.top_k,), "one per token and k")
    halves.check_mask(call, call.x_active_mask, sizes.tokens)
    _check_between(call, layout)
    return layout


def infer_combine_setup(call: Setup) -> dict[str, TensorSpec]:
    """The outputs of the setup, by name, in the operator's order.

    >>> call = CombineSetupCall(
    ...     expand_x=TensorSpec((96, 4096), "bfloat16"), expert_ids=TensorSpec((8, 6), "int32"),
    ...     assist_info_for_combine=TensorSpec((128 * 96,), "int32"), group_ep="ep",
    ...     ep_world_size=2, ep_rank_id=0, moe_expert_num=32, comm_type=2)
    >>> infer_combine_setup(call)["comm_cmd_info"].shape  # 16 · (96 rows + 2 ranks)
    (1568,)
    """
    rows, hidden = call.expand_x.shape
    return {
        "quant_expand_x": TensorSpec((rows, halves.quantized_columns(hidden)), "int8"),
        "comm_cmd_info": TensorSpec((16 * (rows + call.ep_world_size),), "int32"),
    }


def _check_not_empty(name: str, spec: Spec) -> None:
    if isinstance(spec, TensorSpec) and (not spec.shape or min(spec.shape) <= 0):
        raise UnsupportedTypeError(name, spec, "must have elements", "pass a tensor that is not empty")


def _check_attributes(call: Setup | Teardown) -> None:
    halves.check_ranks(call, _RANKS, _EXPERTS)
    for name in ("shared_expert_num", "shared_expert_rank_num"):
        value, fix = getattr(call, name), "let dispatch and combine without setup serve shared experts"
        require(value == 0, name, value, "must be 0 in combine", fix)
    halves.check_attributes(call)
    quant = call.comm_quant_mode
    require(quant == 0, "comm_quant_mode", quant, "must be 0, it is reserved", "use 0")


def _check_rows(call: Setup | Teardown) -> None:
    """Dtypes and dimensions that both have."""
    call.limits.check_dtype("token_dtypes", call.expand_x.dtype, "expand_x", call.expand_x)
    check_dtype("expert_ids", call.expert_ids, ("int32",))
    check_dtype("quant_expand_x", call.quant_expand_x, ("int8",))
    check_dtype("comm_cmd_info", call.comm_cmd_info, ("int32",))
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    check_dims("quant_expand_x", call.quant_expand_x, (2,), "(rows, columns of a message)")
    check_dims("comm_cmd_info", call.comm_cmd_info, (1,), "(numbers,)")


def _sizes(call: Setup | Teardown) -> HalfSizes:
    tokens, top_k = call.expert_ids.shape
    return HalfSizes(tokens, call.expand_x.shape[1], top_k)


def _layout(call: Setup | Teardown, sizes: HalfSizes) -> Layout:
    if call.of_the_chip:
        for argument, value, allowed, what in (
            ("expert_ids", sizes.tokens, _TOKENS, "tokens"),
            ("expand_x", sizes.hidden, _HIDDEN, "columns"),
            ("expert_ids", sizes.top_k, _TOP_K, "columns"),
        ):
            rule = f"must have {', '.join(map(str, allowed[:-1]))} or {allowed[-1]} {what}"
            require(value in allowed, argument, f"of {value} {what}", rule, "use a size that the chip takes")
    halves.check_sizes(call, sizes, "expand_x")
    layout = halves.layout_of(call, sizes)
    check_length("expand_x", call.expand_x, layout.capacity, "the rows that dispatch makes room for")
    return layout


def _check_between(call: Setup | Teardown, layout: Layout) -> None:
    """The tensors that the setup gives and the teardown takes."""
    rows = call.expand_x.shape[0]
    columns = halves.quantized_columns(layout.hidden)
    check_shape("quant_expand_x", call.quant_expand_x, (rows, columns), "a message per row of expand_x")
    length = 16 * (rows + layout.ep)
    check_shape("comm_cmd_info", call.comm_cmd_info, (length,), "16 per row of expand_x and per rank")
