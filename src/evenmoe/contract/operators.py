"""The one table of the operators' arguments (specification §1.2, §2.1, §3.1, §4).

Each argument stands here once, in the operator's order. The schema that torch registers, the functions of torch_npu,
the two-stage calls with their C headers and C names, and the sizes that all ranks must agree on follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evenmoe.contract.argument import Argument, Operator, Signature, integer, optional, output, tensor

_CHECKS = (  # of this package
    Argument("check_values", "bool", required=True, since=None),
    Argument("limits", "str", required=True, since=None),
)
_EXPERT_IDS = tensor("expert_ids", "top-k of `expert_ids`")
_MASK = optional("x_active_mask", "presence of `x_active_mask`")
_GROUPS = (
    Argument("group_ep", "str", required=True),
    integer("ep_world_size", None),
    integer("ep_rank_id", None),
    integer("moe_expert_num", None, "`num_experts`"),
    Argument("group_tp", "str", default=""),
    integer("tp_world_size", 0, "tensor-parallel world size"),
    integer("tp_rank_id"),
    integer("expert_shard_type"),
    integer("shared_expert_num", 1, "`shared_expert_num`"),
    integer("shared_expert_rank_num", 0, "`shared_expert_rank_num`"),
)
_GLOBAL_BS = integer("global_bs", 0, "tokens per rank times ranks (`global_bs`)")
_COMM_ALG = Argument("comm_alg", "str", default="")


def _elastic(since: int) -> Argument:
    return optional("elastic_info", "digest of `elastic_info`", since=since)


def _virtual(since: int) -> tuple[Argument, ...]:
    names = ("zero_expert_num", "copy_expert_num", "const_expert_num")
    return tuple(integer(name, 0, f"`{name}`", since=since) for name in names)


def _combine(
    name: str,
    versions: Mapping[str, int],
    *,
    more_tensors: tuple[Argument, ...] = (),
    more_attributes: tuple[Argument, ...] = (),
    outputs: tuple[Argument, ...],
    scaled_since: int,
    performance_since: int | None,
) -> Operator:
    """Combine, or combine with what else an operator does behind it."""
    arguments = (
        tensor("expand_x", "hidden size of `expert_out`", "dtype of `expert_out`"),
        _EXPERT_IDS,
        tensor("assist_info_for_combine"),
        tensor("ep_send_counts"),
        tensor("expert_scales"),
        *more_tensors,
        optional("tp_send_counts"),
        _MASK,
        optional("activation_scale"),
        optional("weight_scale"),
        optional("group_list"),
        optional("expand_scales"),
        optional("shared_expert_x"),
        _elastic(scaled_since),
        optional("ori_x", since=scaled_since),
        optional("const_expert_alpha_1", since=scaled_since),
        optional("const_expert_alpha_2", since=scaled_since),
        optional("const_expert_v", since=scaled_since),
        optional("performance_info", since=performance_since),
        optional("dispatch_number", since=None),  # the eighth output of dispatch
        *_GROUPS,
        _GLOBAL_BS,
        integer("out_dtype"),
        integer("comm_quant_mode", 0, "`comm_quant_mode`"),
        integer("group_list_type"),
        _COMM_ALG,
        *more_attributes,
        *_virtual(scaled_since),
        *_CHECKS,
        *outputs,
    )
    return Operator(name, arguments, versions)


UPDATE_EXPERT = Operator(
    "update_expert",
    (
        tensor("expert_ids"),
        tensor("eplb_table"),
        optional("expert_scales", since=2),
        optional("pruning_threshold", since=2),
        optional("active_mask", since=2),
        integer("local_rank_id", -1),
        integer("world_size", -1),
        integer("balance_mode"),
        *_CHECKS,
        output("balanced_expert_ids"),
        output("balanced_active_mask", since=2),
    ),
    {"MoeEPLBUpdateExpert": 1, "MoeUpdateExpert": 2},
)
DISPATCH = Operator(
    "dispatch",
    (
        tensor("x", "hidden size of `x`", "dtype of `x`"),
        _EXPERT_IDS,
        optional("scales", "presence of `scales`"),
        _MASK,
        optional("expert_scales", "presence of `expert_scales`"),
        _elastic(since=3),
        optional("performance_info", since=4),
        *_GROUPS,
        integer("quant_mode", 0, "`quant_mode`"),
        _GLOBAL_BS,
        integer("expert_token_nums_type", 1),
        _COMM_ALG,
        *_virtual(since=3),
        *_CHECKS,
        output("expand_x", c_name="expandXOut"),
        output("dynamic_scales", c_name="dynamicScalesOut"),
        output("assist_info_for_combine", c_name="assistInfoForCombineOut"),
        output("expert_token_nums", c_name="expertTokenNumsOut"),
        output("ep_recv_counts", c_name="epRecvCountsOut"),
        output("tp_recv_counts", c_name="tpRecvCountsOut"),
        output("expand_scales", c_name="expandScalesOut"),
        output("dispatch_number", since=None),  # which exchange of each group it was
    ),
    {"MoeDistributeDispatchV2": 2, "MoeDistributeDispatchV3": 3, "MoeDistributeDispatchV4": 4},
)
COMBINE = _combine(
    "combine",
    {"MoeDistributeCombineV2": 2, "MoeDistributeCombineV3": 3, "MoeDistributeCombineV4": 4},
    outputs=(output("x_out"),),
    scaled_since=3,
    performance_since=4,
)
COMBINE_ADD_RMS_NORM = _combine(
    "combine_add_rms_norm",
    {"MoeDistributeCombineAddRmsNorm": 1, "MoeDistributeCombineAddRmsNormV2": 2},
    more_tensors=(tensor("residual_x"), tensor("gamma")),
    more_attributes=(Argument("norm_eps", "float", default=1e-6),),
    outputs=(output("y_out"), output("rstd_out"), output("x_out")),
    scaled_since=2,
    performance_since=None,
)

_HALF_GROUP = (
    Argument("group_ep", "str", required=True),
    integer("ep_world_size", None),
    integer("ep_rank_id", None),
    integer("moe_expert_num", None, "`num_experts`"),
    integer("expert_shard_type"),
    integer("shared_expert_num", 1, "`shared_expert_num`"),
    integer("shared_expert_rank_num", 0, "`shared_expert_rank_num`"),
)
_COMM_TYPE = integer("comm_type")
DISPATCH_SETUP = Operator(
    "dispatch_setup",
    (
        tensor("x", "hidden size of `x`", "dtype of `x`"),
        _EXPERT_IDS,
        optional("scales", "presence of `scales`"),
        optional("x_active_mask"),
        *_HALF_GROUP,
        integer("quant_mode", 0, "`quant_mode`"),
        _GLOBAL_BS,
        _COMM_TYPE,
        _COMM_ALG,
        *_CHECKS,
        output("y", c_name="yOut"),
        output("expand_idx", c_name="expandIdxOut"),
        output("comm_cmd_info", c_name="commCmdInfoOut"),
    ),
    {"MoeDistributeDispatchSetup": 1},
)
DISPATCH_TEARDOWN = Operator(
    "dispatch_teardown",
    (
        tensor("x"),
        tensor("y"),
        _EXPERT_IDS,
        tensor("comm_cmd_info"),
        *_HALF_GROUP,
        integer("quant_mode"),
        _GLOBAL_BS,
        integer("expert_token_nums_type", 1),
        _COMM_TYPE,
        _COMM_ALG,
        *_CHECKS,
        output("expand_x", c_name="expandXOut"),
        output("dynamic_scales", c_name="dynamicScalesOut"),
        output("assist_info_for_combine", c_name="assistInfoForCombineOut"),
        output("expert_token_nums", c_name="expertTokenNumsOut"),
    ),
    {"MoeDistributeDispatchTeardown": 1},
)
COMBINE_SETUP = Operator(
    "combine_setup",
    (
        tensor("expand_x", "hidden size of `expert_out`", "dtype of `expert_out`"),
        _EXPERT_IDS,
        tensor("assist_info_for_combine"),
        *_HALF_GROUP,
        _GLOBAL_BS,
        integer("comm_quant_mode"),
        _COMM_TYPE,
        _COMM_ALG,
        *_CHECKS,
        output("quant_expand_x", c_name="quantExpandXOut"),
        output("comm_cmd_info", c_name="commCmdInfoOut"),
    ),
    {"MoeDistributeCombineSetup": 1},
)
COMBINE_TEARDOWN = Operator(
    "combine_teardown",
    (
        tensor("expand_x"),
        tensor("quant_expand_x"),
        _EXPERT_IDS,
        tensor("expand_idx"),
        tensor("expert_scales"),
        tensor("comm_cmd_info"),
        optional("x_active_mask"),
        optional("shared_expert_x"),
        *_HALF_GROUP,
        _GLOBAL_BS,
        integer("comm_quant_mode"),
        _COMM_TYPE,
        _COMM_ALG,
        *_CHECKS,
        output("x_out"),
    ),
    {"MoeDistributeCombineTeardown": 1},
)


def _first_version(arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """The first versions' C functions call no argument optional."""
    return tuple(replace(a, c_name=a.c_name.removesuffix("Optional")) for a in arguments)


DISPATCH_V1 = Operator(
    "dispatch_v1",
    _first_version(
        (
            tensor("x"),
            tensor("expert_ids"),
            optional("scales"),
            optional("x_active_mask"),
            optional("expert_scales"),
            *_GROUPS,
            integer("quant_mode"),
            _GLOBAL_BS,
            integer("expert_token_nums_type", 1),
            *_CHECKS,
            output("expand_x"),
            output("dynamic_scales"),
            output("expand_idx"),
            output("expert_token_nums"),
            output("ep_recv_counts"),
            output("tp_recv_counts"),
            output("expand_scales"),
            output("dispatch_number", since=None),
        )
    ),
    {"MoeDistributeDispatch": 1},
)
COMBINE_V1 = Operator(
    "combine_v1",
    _first_version(
        (
            tensor("expand_x"),
            tensor("expert_ids"),
            tensor("expand_idx"),
            tensor("ep_send_counts"),
            tensor("expert_scales"),
            optional("tp_send_counts"),
            optional("x_active_mask"),
            optional("activation_scale"),
            optional("weight_scale"),
            optional("group_list"),
            optional("expand_scales"),
            optional("shared_expert_x", since=2),  # of torch_npu alone
            optional("dispatch_number", since=None),
            *_GROUPS,
            _GLOBAL_BS,
            integer("out_dtype"),
            integer("comm_quant_mode"),
            integer("group_list_type"),
            *_CHECKS,
            output("x_out", c_name="x"),
        )
    ),
    {"MoeDistributeCombine": 1},
)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        UPDATE_EXPERT,
        DISPATCH,
        COMBINE,
        COMBINE_ADD_RMS_NORM,
        DISPATCH_V1,
        COMBINE_V1,
        DISPATCH_SETUP,
        DISPATCH_TEARDOWN,
        COMBINE_SETUP,
        COMBINE_TEARDOWN,
    )
}
"""Every operator by its registered name."""


def _over_context(operator: Operator) -> Signature:
    """The function that takes a context and a buffer's size in place of the groups' names (§2.18)."""
    arguments = {"context": tensor("context")}
    for argument in operator.published(max(operator.versions.values())):
        if argument.name not in ("group_ep", "group_tp"):
            arguments[argument.name] = argument
        if argument.name == "moe_expert_num":
            arguments["ccl_buffer_size"] = integer("ccl_buffer_size", None)
    return Signature(operator.name, arguments)


SIGNATURES: dict[str, Signature] = {
    name: Signature(operator.name, {argument.name: argument for argument in operator.published(version)})
    for operator in OPERATORS.values()
    for name, version in operator.versions.items()
} | {
    "MoeDistributeDispatchV5": _over_context(DISPATCH),
    "MoeDistributeCombineV5": _over_context(COMBINE),
}
"""Every C function by its name behind `aclnn`."""


def schema(operator: Operator) -> str:
    """What `torch.library` registers the operator with: tensors by position, attributes by keyword.

    Even a required tensor may be None for torch: the contract's check then says which is missing, with its status. And
    no argument has a default: torch leaves out of the call what equals its default.

    >>> schema(UPDATE_EXPERT).partition(", *, ")[2]
    'int local_rank_id, int world_size, int balance_mode, bool check_values, str limits) -> (Tensor, Tensor)'
    """
    tensors = [f"Tensor? {argument.name}" for argument in operator.of_kind("tensor")]
    attributes = [f"{argument.kind} {argument.name}" for argument in operator.of_kind("str", "int", "float", "bool")]
    returned = ["Tensor" for _ in operator.of_kind("output")]
    returns = returned[0] if len(returned) == 1 else f"({', '.join(returned)})"
    return f"({', '.join([*tensors, '*', *attributes])}) -> {returns}"


def agreement(operator: Operator) -> tuple[str, ...]:
    """What all ranks must agree on, the first difference to be named first.

    What a call must give comes before what it may: the digest of `elastic_info` differs with `num_experts`, too.

    >>> agreement(COMBINE)[:5]
    ('hidden size of `expert_out`', 'dtype of `expert_out`', 'top-k of `expert_ids`', '`num_experts`', \
'tensor-parallel world size')
    """
    first = [a for a in operator.arguments if a.required or a.kind != "tensor"]
    last = [a for a in operator.arguments if not (a.required or a.kind != "tensor")]
    return tuple(label for argument in (*first, *last) for label in argument.agrees)
