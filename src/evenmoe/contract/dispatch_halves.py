"""What MoeDistributeDispatchSetup and MoeDistributeDispatchTeardown accept (specification §14.2)."""

from __future__ import annotations

from typing import cast

from evenmoe.contract import halves
from evenmoe.contract.half_calls import DispatchSetupCall, DispatchTeardownCall
from evenmoe.contract.halves import HalfSizes
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

_PER_TOKEN = 2
Setup = DispatchSetupCall[TensorSpec]
Teardown = DispatchTeardownCall[TensorSpec]


def check_dispatch_setup_call(call: Setup) -> Layout:
    """Checks one rank's setup of dispatch, and derives its layout; the first mistake of §14.2 is raised.

    Raises:
        MissingArgumentError: a null tensor or group name.
        UnsupportedTypeError: a dtype that the operator does not take, or a group name of 128 characters or more.
        ConstraintError: everything else.

    Two ranks of 8 tokens with 6 experts each may all want this rank's experts: 2 · 8 · 6 rows.

    >>> call = DispatchSetupCall(
    ...     x=TensorSpec((8, 4096), "bfloat16"), expert_ids=TensorSpec((8, 6), "int32"), group_ep="ep",
    ...     ep_world_size=2, ep_rank_id=0, moe_expert_num=32, comm_type=2)
    >>> check_dispatch_setup_call(call).capacity
    96
    """
    check_given("x", call.x, "pass the tokens")
    check_given("expert_ids", call.expert_ids, "pass the experts of the tokens")
    halves.check_outputs_given({"y": call.y, "expand_idx": call.expand_idx, "comm_cmd_info": call.comm_cmd_info})
    halves.check_group(call)
    call = cast(Setup, halves.whole_numbers(call, "quant_mode"))
    halves.check_ranks(call)
    halves.check_attributes(call)
    _check_quant_mode(call.quant_mode)
    _check_token_dtypes(call, "y")
    check_dtype("scales", call.scales, ("float32",))
    check_dtype("x_active_mask", call.x_active_mask, ("bool",))
    check_dtype("expand_idx", call.expand_idx, ("int32",))
    check_dtype("comm_cmd_info", call.comm_cmd_info, ("int32",))
    sizes = _sizes(call)
    check_dims("scales", call.scales, (2,), "(shared experts + experts, hidden)")
    check_dims("x_active_mask", call.x_active_mask, (1,), "(tokens,)")
    check_dims("y", call.y, (2,), "(rows, columns of a message)")
    check_dims("expand_idx", call.expand_idx, (1,), "(tokens·top_k,)")
    check_dims("comm_cmd_info", call.comm_cmd_info, (1,), "(numbers,)")
    halves.check_mask(call, call.x_active_mask, sizes.tokens)
    halves.check_sizes(call, sizes, "x")
    layout = halves.layout_of(call, sizes)
    rule, fix = "must be None without quantization", "use quant_mode=2, or no scales"
    require(call.scales is None or call.quant_mode == _PER_TOKEN, "scales", call.scales, rule, fix)
    rows = call.shared_expert_num + call.moe_expert_num
    check_shape("scales", call.scales, (rows, sizes.hidden), "one row per shared and MoE expert")
    for name, spec in infer_dispatch_setup(call, layout).items():
        check_shape(name, getattr(call, name), spec.shape, "as CalcOutputSize has it")
    return layout


def check_dispatch_teardown_call(call: Teardown) -> Layout:
    """As `check_dispatch_setup_call`, of the teardown; a group name that is too long is 161001 here."""
    check_given("x", call.x, "pass the tokens of the setup")
    check_given("y", call.y, "pass what the setup gave")
    check_given("expert_ids", call.expert_ids, "pass the experts of the tokens")
    check_given("comm_cmd_info", call.comm_cmd_info, "pass what the setup gave")
    halves.check_outputs_given(
        {
            "expand_x": call.expand_x,
            "dynamic_scales": call.dynamic_scales,
            "assist_info_for_combine": call.assist_info_for_combine,
            "expert_token_nums": call.expert_token_nums,
        }
    )
    halves.check_group(call, MissingArgumentError)
    call = cast(Teardown, halves.whole_numbers(call, "quant_mode", "expert_token_nums_type"))
    halves.check_ranks(call)
    halves.check_attributes(call)
    _check_quant_mode(call.quant_mode)
    kind = call.expert_token_nums_type
    require(kind == 1, "expert_token_nums_type", kind, "must be 1, counts", "add them up yourself for prefix sums")
    sizes = _sizes(call)
    check_dims("y", call.y, (2,), "(rows, columns of a message)")
    check_dims("comm_cmd_info", call.comm_cmd_info, (1,), "(numbers,)")
    check_dims("expand_x", call.expand_x, (2,), "(rows, hidden)")
    check_dims("assist_info_for_combine", call.assist_info_for_combine, (1,), "(128·rows,)")
    check_dims("expert_token_nums", call.expert_token_nums, (1,), "(local experts,)")
    halves.check_sizes(call, sizes, "x")
    layout = halves.layout_of(call, sizes)
    rows = layout.num_tokens * (layout.top_k + call.shared_expert_num)
    columns = halves.message_columns(layout.hidden, call.quant_mode)
    check_shape("y", call.y, (rows, columns), "what the setup gave")
    check_shape("comm_cmd_info", call.comm_cmd_info, (halves.setup_commands(call, layout),), "what the setup gave")
    quantized = call.quant_mode == _PER_TOKEN
    for name, spec in infer_dispatch_teardown(call, layout).items():
        if name == "dynamic_scales" and not quantized:
            continue  # nothing is written
        check_shape(name, getattr(call, name), spec.shape, "as many as may arrive")
    _check_token_dtypes(call, "y")
    _check_token_dtypes(call, "expand_x")
    check_dtype("comm_cmd_info", call.comm_cmd_info, ("int32",))
    check_dtype("dynamic_scales", call.dynamic_scales, ("float32",))
    check_dtype("assist_info_for_combine", call.assist_info_for_combine, ("int32",))
    check_dtype("expert_token_nums", call.expert_token_nums, ("int64",))
    return layout


def infer_dispatch_setup(call: Setup, layout: Layout) -> dict[str, TensorSpec]:
    """The outputs of the setup, by name, in the operator's order."""
    dtype = "int8" if call.quant_mode == _PER_TOKEN else call.x.dtype
    rows = layout.num_tokens * (layout.top_k + call.shared_expert_num)
    return {
        "y": TensorSpec((rows, halves.message_columns(layout.hidden, call.quant_mode)), dtype),
        "expand_idx": TensorSpec((layout.num_tokens * layout.top_k,), "int32"),
        "comm_cmd_info": TensorSpec((halves.setup_commands(call, layout),), "int32"),
    }


def infer_dispatch_teardown(call: Teardown, layout: Layout) -> dict[str, TensorSpec]:
    """The outputs of the teardown, by name, in the operator's order."""
    dtype = "int8" if call.quant_mode == _PER_TOKEN else call.x.dtype
    return {
        "expand_x": TensorSpec((layout.capacity, layout.hidden), dtype),
        "dynamic_scales": TensorSpec((layout.capacity,), "float32"),
        "assist_info_for_combine": TensorSpec((128 * layout.capacity,), "int32"),
        "expert_token_nums": TensorSpec((layout.local_experts,), "int64"),
    }


def _check_quant_mode(mode: int) -> None:
    rule, fix = "must be 0, or 2 for int8 by token", "use one of them; float8 is not computed here"
    require(mode in (0, _PER_TOKEN), "quant_mode", mode, rule, fix)


def _check_token_dtypes(call: Setup | Teardown, message: str) -> None:
    """The tokens' dtype, and that of a tensor with rows as they travel."""
    call.limits.check_dtype("token_dtypes", call.x.dtype, "x", call.x)
    check_dtype("expert_ids", call.expert_ids, ("int32",))
    spec = getattr(call, message)
    sent = "int8" if call.quant_mode == _PER_TOKEN else call.x.dtype
    check_dtype(message, spec, (*call.limits.token_dtypes, "int8"))
    check_dtype_of(message, spec, sent, "x's, or int8 with quant_mode 2")


def _sizes(call: Setup | Teardown) -> HalfSizes:
    check_dims("x", call.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", call.expert_ids, (2,), "(tokens, top_k)")
    tokens, top_k = call.expert_ids.shape
    check_length("x", call.x, tokens, "one row per token")
    check_shape("x", call.x, (tokens, call.x.shape[1]), "one row per row of expert_ids")
    return HalfSizes(tokens, call.x.shape[1], top_k)
