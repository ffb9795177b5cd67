"""The arguments of the two-stage calls in the order of the C functions (specification §1.2, §2.1, §3.1, §4).

Names are the specification's in snake_case; "Optional" and "Out" are no part of them where the name alone says enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["tensor", "str", "int", "float", "output"]


@dataclass(frozen=True)
class Signature:
    """One operator of the two-stage interface.

    Attributes:
        family: the registered operator that computes it, of `torch.ops.evenmoe`.
        arguments: {name: kind} in C order, without workspaceSize and executor.
    """

    family: str
    arguments: dict[str, Kind]

    def names(self, *kinds: Kind) -> list[str]:
        """The arguments of these kinds, in order.

        >>> SIGNATURES["MoeEPLBUpdateExpert"].names("tensor", "int", "output")
        ['expert_ids', 'eplb_table', 'local_rank_id', 'world_size', 'balance_mode', 'balanced_expert_ids']
        """
        return [name for name, kind in self.arguments.items() if kind in kinds]


def _of_kind(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


def _insert(arguments: dict[str, Kind], after: str, kind: Kind, names: str) -> dict[str, Kind]:
    """The same arguments with more of them behind `after`."""
    items = list(arguments.items())
    place = list(arguments).index(after) + 1
    return dict([*items[:place], *_of_kind(kind, names).items(), *items[place:]])


_EP = _of_kind("str", "group_ep") | _of_kind("int", "ep_world_size ep_rank_id moe_expert_num")
_TP = _of_kind("str", "group_tp") | _of_kind("int", "tp_world_size tp_rank_id expert_shard_type")
_SHARED = _of_kind("int", "shared_expert_num shared_expert_rank_num")
_VIRTUAL = "zero_expert_num copy_expert_num const_expert_num"
_CONSTANTS = "elastic_info ori_x const_expert_alpha_1 const_expert_alpha_2 const_expert_v"

_DISPATCH_V2 = (
    _of_kind("tensor", "x expert_ids scales x_active_mask expert_scales")
    | _EP
    | _TP
    | _SHARED
    | _of_kind("int", "quant_mode global_bs expert_token_nums_type")
    | _of_kind("str", "comm_alg")
    | _of_kind(
        "output",
        "expand_x dynamic_scales assist_info_for_combine expert_token_nums ep_recv_counts tp_recv_counts expand_scales",
    )
)
_DISPATCH_V3 = _insert(_insert(_DISPATCH_V2, "expert_scales", "tensor", "elastic_info"), "comm_alg", "int", _VIRTUAL)

_COMBINE_ATTRIBUTES = (
    _EP
    | _TP
    | _SHARED
    | _of_kind("int", "global_bs out_dtype comm_quant_mode group_list_type")
    | _of_kind("str", "comm_alg")
)
_COMBINE_OPTIONAL = _of_kind(
    "tensor",
    "tp_send_counts x_active_mask activation_scale weight_scale group_list expand_scales shared_expert_x",
)
_EXPERT_OUTPUTS = _of_kind("tensor", "expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales")
_COMBINE_V2 = _EXPERT_OUTPUTS | _COMBINE_OPTIONAL | _COMBINE_ATTRIBUTES | _of_kind("output", "x_out")
_COMBINE_V3 = _insert(_insert(_COMBINE_V2, "shared_expert_x", "tensor", _CONSTANTS), "comm_alg", "int", _VIRTUAL)
_NORM_V1 = (
    _EXPERT_OUTPUTS
    | _of_kind("tensor", "residual_x gamma")
    | _COMBINE_OPTIONAL
    | _COMBINE_ATTRIBUTES
    | _of_kind("float", "norm_eps")
    | _of_kind("output", "y_out rstd_out x_out")
)
_NORM_V2 = _insert(_insert(_NORM_V1, "shared_expert_x", "tensor", _CONSTANTS), "norm_eps", "int", _VIRTUAL)

SIGNATURES: dict[str, Signature] = {
    "MoeEPLBUpdateExpert": Signature(
        "update_expert",
        _of_kind("tensor", "expert_ids eplb_table")
        | _of_kind("int", "local_rank_id world_size balance_mode")
        | _of_kind("output", "balanced_expert_ids"),
    ),
    "MoeUpdateExpert": Signature(
        "update_expert",
        _of_kind("tensor", "expert_ids eplb_table expert_scales pruning_threshold active_mask")
        | _of_kind("int", "local_rank_id world_size balance_mode")
        | _of_kind("output", "balanced_expert_ids balanced_active_mask"),
    ),
    "MoeDistributeDispatchV2": Signature("dispatch", _DISPATCH_V2),
    "MoeDistributeDispatchV3": Signature("dispatch", _DISPATCH_V3),
    "MoeDistributeDispatchV4": Signature(
        "dispatch", _insert(_DISPATCH_V3, "elastic_info", "tensor", "performance_info")
    ),
    "MoeDistributeCombineV2": Signature("combine", _COMBINE_V2),
    "MoeDistributeCombineV3": Signature("combine", _COMBINE_V3),
    "MoeDistributeCombineV4": Signature(
        "combine", _insert(_COMBINE_V3, "const_expert_v", "tensor", "performance_info")
    ),
    "MoeDistributeCombineAddRmsNorm": Signature("combine_add_rms_norm", _NORM_V1),
    "MoeDistributeCombineAddRmsNormV2": Signature("combine_add_rms_norm", _NORM_V2),
}
"""Every operator by its name behind `aclnn`."""
