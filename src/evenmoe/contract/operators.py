"""The one table of the operators' arguments (specification §1.2, §2.1, §3.1, §4).

Each argument stands here once, in the operator's order. The schema that torch registers, the functions of torch_npu,
the two-stage calls with their C headers and C names, and the sizes that all ranks must agree on follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["tensor", "output", "str", "int", "float", "bool"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an operator.

    Attributes:
        name: as the specification has it, in snake_case.
        kind: a tensor that is read, a tensor that is written, or the type of an attribute.
        required: whether a call must give it; an output is always given in C, and never anywhere else.
        default: of an attribute that need not be given; None for tensors.
        since: the first version of the C function that has it, None where no C function does.
        c_name: its name in the C functions.
        agrees: what must be equal on all ranks, as an error names it.
    """

    name: str
    kind: Kind
    required: bool = False
    default: str | float | None = None
    since: int | None = 1
    c_name: str = ""
    agrees: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.c_name:
            camel = re.sub(r"_(\w)", lambda match: match[1].upper(), self.name)
            optional = self.kind == "tensor" and not self.required
            object.__setattr__(self, "c_name", f"{camel}Optional" if optional else camel)


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator in all its versions.

    Attributes:
        name: it is registered as `torch.ops.evenmoe.<name>`.
        arguments: tensors, attributes and outputs, each in the operator's order.
        versions: the C functions that compute it, {name behind `aclnn`: version}.
    """

    name: str
    arguments: tuple[Argument, ...]
    versions: Mapping[str, int]

    def of_kind(self, *kinds: Kind) -> tuple[Argument, ...]:
        """The arguments of these kinds, in order."""
        return tuple(argument for argument in self.arguments if argument.kind in kinds)

    def published(self, version: int) -> tuple[Argument, ...]:
        """The arguments that the operator has in this version, in order."""
        return tuple(a for a in self.arguments if a.since is not None and a.since <= version)


@dataclass(frozen=True, slots=True)
class Signature:
    """One C function of the two-stage interface.

    Attributes:
        operator: the registered operator that computes it.
        arguments: in C order, by name, without workspaceSize and executor.
    """

    operator: str
    arguments: Mapping[str, Argument]

    def names(self, *kinds: Kind) -> list[str]:
        """The arguments of these kinds, in order.

        >>> SIGNATURES["MoeEPLBUpdateExpert"].names("tensor", "int", "output")
        ['expert_ids', 'eplb_table', 'local_rank_id', 'world_size', 'balance_mode', 'balanced_expert_ids']
        """
        return [name for name, argument in self.arguments.items() if argument.kind in kinds]


def _tensor(name: str, *agrees: str) -> Argument:
    return Argument(name, "tensor", required=True, agrees=agrees)


def _optional(name: str, *agrees: str, since: int | None = 1) -> Argument:
    return Argument(name, "tensor", since=since, agrees=agrees)


def _int(name: str, default: int | None = 0, *agrees: str, since: int = 1) -> Argument:
    return Argument(name, "int", default is None, default, since, agrees=agrees)


def _output(name: str, since: int | None = 1, c_name: str = "") -> Argument:
    return Argument(name, "output", since=since, c_name=c_name)


_CHECKS = (  # of this package
    Argument("check_values", "bool", required=True, since=None),
    Argument("limits", "str", required=True, since=None),
)
_EXPERT_IDS = _tensor("expert_ids", "top-k of `expert_ids`")
_MASK = _optional("x_active_mask", "presence of `x_active_mask`")
_GROUPS = (
    Argument("group_ep", "str", required=True),
    _int("ep_world_size", None),
    _int("ep_rank_id", None),
    _int("moe_expert_num", None, "`num_experts`"),
    Argument("group_tp", "str", default=""),
    _int("tp_world_size", 0, "tensor-parallel world size"),
    _int("tp_rank_id"),
    _int("expert_shard_type"),
    _int("shared_expert_num", 1, "`shared_expert_num`"),
    _int("shared_expert_rank_num", 0, "`shared_expert_rank_num`"),
)
_GLOBAL_BS = _int("global_bs", 0, "tokens per rank times ranks (`global_bs`)")
_COMM_ALG = Argument("comm_alg", "str", default="")


def _elastic(since: int) -> Argument:
    return _optional("elastic_info", "digest of `elastic_info`", since=since)


def _virtual(since: int) -> tuple[Argument, ...]:
    names = ("zero_expert_num", "copy_expert_num", "const_expert_num")
    return tuple(_int(name, 0, f"`{name}`", since=since) for name in names)


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
        _tensor("expand_x", "hidden size of `expert_out`", "dtype of `expert_out`"),
        _EXPERT_IDS,
        _tensor("assist_info_for_combine"),
        _tensor("ep_send_counts"),
        _tensor("expert_scales"),
        *more_tensors,
        _optional("tp_send_counts"),
        _MASK,
        _optional("activation_scale"),
        _optional("weight_scale"),
        _optional("group_list"),
        _optional("expand_scales"),
        _optional("shared_expert_x"),
        _elastic(scaled_since),
        _optional("ori_x", since=scaled_since),
        _optional("const_expert_alpha_1", since=scaled_since),
        _optional("const_expert_alpha_2", since=scaled_since),
        _optional("const_expert_v", since=scaled_since),
        _optional("performance_info", since=performance_since),
        _optional("dispatch_number", since=None),  # the eighth output of dispatch
        *_GROUPS,
        _GLOBAL_BS,
        _int("out_dtype"),
        _int("comm_quant_mode", 0, "`comm_quant_mode`"),
        _int("group_list_type"),
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
        _tensor("expert_ids"),
        _tensor("eplb_table"),
        _optional("expert_scales", since=2),
        _optional("pruning_threshold", since=2),
        _optional("active_mask", since=2),
        _int("local_rank_id", -1),
        _int("world_size", -1),
        _int("balance_mode"),
        *_CHECKS,
        _output("balanced_expert_ids"),
        _output("balanced_active_mask", since=2),
    ),
    {"MoeEPLBUpdateExpert": 1, "MoeUpdateExpert": 2},
)
DISPATCH = Operator(
    "dispatch",
    (
        _tensor("x", "hidden size of `x`", "dtype of `x`"),
        _EXPERT_IDS,
        _optional("scales", "presence of `scales`"),
        _MASK,
        _optional("expert_scales", "presence of `expert_scales`"),
        _elastic(since=3),
        _optional("performance_info", since=4),
        *_GROUPS,
        _int("quant_mode", 0, "`quant_mode`"),
        _GLOBAL_BS,
        _int("expert_token_nums_type", 1),
        _COMM_ALG,
        *_virtual(since=3),
        *_CHECKS,
        _output("expand_x", c_name="expandXOut"),
        _output("dynamic_scales", c_name="dynamicScalesOut"),
        _output("assist_info_for_combine", c_name="assistInfoForCombineOut"),
        _output("expert_token_nums", c_name="expertTokenNumsOut"),
        _output("ep_recv_counts", c_name="epRecvCountsOut"),
        _output("tp_recv_counts", c_name="tpRecvCountsOut"),
        _output("expand_scales", c_name="expandScalesOut"),
        _output("dispatch_number", since=None),  # which exchange of each group it was
    ),
    {"MoeDistributeDispatchV2": 2, "MoeDistributeDispatchV3": 3, "MoeDistributeDispatchV4": 4},
)
COMBINE = _combine(
    "combine",
    {"MoeDistributeCombineV2": 2, "MoeDistributeCombineV3": 3, "MoeDistributeCombineV4": 4},
    outputs=(_output("x_out"),),
    scaled_since=3,
    performance_since=4,
)
COMBINE_ADD_RMS_NORM = _combine(
    "combine_add_rms_norm",
    {"MoeDistributeCombineAddRmsNorm": 1, "MoeDistributeCombineAddRmsNormV2": 2},
    more_tensors=(_tensor("residual_x"), _tensor("gamma")),
    more_attributes=(Argument("norm_eps", "float", default=1e-6),),
    outputs=(_output("y_out"), _output("rstd_out"), _output("x_out")),
    scaled_since=2,
    performance_since=None,
)


def _first_version(arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """The first versions' C functions call no argument optional."""
    return tuple(replace(a, c_name=a.c_name.removesuffix("Optional")) for a in arguments)


DISPATCH_V1 = Operator(
    "dispatch_v1",
    _first_version(
        (
            _tensor("x"),
            _tensor("expert_ids"),
            _optional("scales"),
            _optional("x_active_mask"),
            _optional("expert_scales"),
            *_GROUPS,
            _int("quant_mode"),
            _GLOBAL_BS,
            _int("expert_token_nums_type", 1),
            *_CHECKS,
            _output("expand_x"),
            _output("dynamic_scales"),
            _output("expand_idx"),
            _output("expert_token_nums"),
            _output("ep_recv_counts"),
            _output("tp_recv_counts"),
            _output("expand_scales"),
            _output("dispatch_number", since=None),
        )
    ),
    {"MoeDistributeDispatch": 1},
)
COMBINE_V1 = Operator(
    "combine_v1",
    _first_version(
        (
            _tensor("expand_x"),
            _tensor("expert_ids"),
            _tensor("expand_idx"),
            _tensor("ep_send_counts"),
            _tensor("expert_scales"),
            _optional("tp_send_counts"),
            _optional("x_active_mask"),
            _optional("activation_scale"),
            _optional("weight_scale"),
            _optional("group_list"),
            _optional("expand_scales"),
            _optional("shared_expert_x", since=2),  # of torch_npu alone
            _optional("dispatch_number", since=None),
            *_GROUPS,
            _GLOBAL_BS,
            _int("out_dtype"),
            _int("comm_quant_mode"),
            _int("group_list_type"),
            *_CHECKS,
            _output("x_out", c_name="x"),
        )
    ),
    {"MoeDistributeCombine": 1},
)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (UPDATE_EXPERT, DISPATCH, COMBINE, COMBINE_ADD_RMS_NORM, DISPATCH_V1, COMBINE_V1)
}
"""Every operator by its registered name."""


SIGNATURES: dict[str, Signature] = {
    name: Signature(operator.name, {argument.name: argument for argument in operator.published(version)})
    for operator in OPERATORS.values()
    for name, version in operator.versions.items()
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
