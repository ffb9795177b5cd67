"""What the algorithms that `comm_alg` names take (specification §2.2, §2.14); what they compute is the same.

The algorithm of combine_add_rms_norm is not looked at.
"""

from __future__ import annotations

from evenmoe.contract.calls import AddRmsNormCall, CombineCall, DispatchCall, DistributeCall
from evenmoe.contract.distribute import Sizes
from evenmoe.contract.layout import Layout
from evenmoe.contract.tensor_spec import TensorSpec, check_dims, check_given, check_length, join_or
from evenmoe.errors import require

FULL_MESH_V2, HIERARCHY = "fullmesh_v2", "hierarchy"
_RANKS_PER_NODE = 8  # by which the chip's counts of hierarchy are laid out
Call = DistributeCall[TensorSpec]


def is_hierarchy(call: Call) -> bool:
    """Whether the ranks of a node exchange first, then the nodes."""
    return call.comm_alg == HIERARCHY and HIERARCHY in call.limits.comm_algs and not isinstance(call, AddRmsNormCall)


def check_known(call: Call) -> None:
    """A name that dispatch does not know is a ConstraintError; None is ""."""
    quoted = tuple(f'"{name}"' for name in call.limits.comm_algs)
    known = call.comm_alg is None or call.comm_alg in call.limits.comm_algs
    require(known, "comm_alg", repr(call.comm_alg), f"must be {join_or(quoted)}", 'use "" for the default')


def check_restrictions(call: Call, sizes: Sizes) -> None:
    """What "fullmesh_v2" and "hierarchy" must not be combined with.

    Raises:
        MissingArgumentError: hierarchy without the weights that it sends.
        ConstraintError: everything else.

    Hierarchy is for whole nodes of 16 ranks:

    >>> spec, world = TensorSpec, {"group_ep": "ep", "ep_world_size": 24, "ep_rank_id": 0, "moe_expert_num": 24}
    >>> call = DispatchCall(x=spec((8, 7168), "bfloat16"), expert_ids=spec((8, 3), "int32"), comm_alg="hierarchy",
    ...     expert_scales=spec((8, 3), "float32"), **world)
    >>> check_restrictions(call, Sizes(8, 7168, 3))
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `comm_alg` is "hierarchy" with 24 ranks: it takes 16 to 256 in steps of 16 ranks; \
use "fullmesh_v1", or lift this bound of atlas-a3 with limits="relaxed".
    """
    if is_hierarchy(call):
        _check_hierarchy(call, sizes)
    elif call.comm_alg == FULL_MESH_V2 and isinstance(call, DispatchCall):
        _check_full_mesh(call, sizes)


def _check_full_mesh(call: Call, sizes: Sizes) -> None:
    if call.limits.full_mesh_alone:
        _exclude(call, _special_tokens(call))
    _exclude(call, {"tp_world_size 2": call.tp_world_size == 2})
    if call.limits.full_mesh_alone:
        _exclude(call, _unequal_tokens(call, sizes))
    _bound(call, "full_mesh_tokens", sizes.tokens, "tokens")
    _bound(call, "full_mesh_top_k", sizes.top_k, "experts per token")


def _check_hierarchy(call: Call, sizes: Sizes) -> None:
    excluded = {
        "tp_world_size 2": call.tp_world_size == 2,
        "ranks of shared experts": call.shared_expert_rank_num > 0,
        **_special_tokens(call),
        **_unequal_tokens(call, sizes),
    }
    if isinstance(call, DispatchCall):
        check_given("expert_scales", call.expert_scales, 'pass the gate weights, which "hierarchy" sends with the rows')
        check_dims("expert_scales", call.expert_scales, (2,), "(tokens, top_k)")
        excluded["scales"] = call.scales is not None
    if isinstance(call, CombineCall):
        check_given("expand_scales", call.expand_scales, "pass dispatch's expand_scales")
        check_dims("expand_scales", call.expand_scales, (1,), "(rows,)")
        excluded["shared_expert_x"] = call.shared_expert_x is not None
    _exclude(call, excluded)
    _bound(call, "hierarchy_ranks", call.ep_world_size, "ranks")
    _bound(call, "hierarchy_experts", call.moe_expert_num, "physical experts")
    _bound(call, "hierarchy_tokens", sizes.tokens, "tokens")
    _bound(call, "hierarchy_hidden", sizes.hidden, "columns")


def _special_tokens(call: Call) -> dict[str, bool]:
    mask = call.x_active_mask
    return {
        "elastic_info": call.elastic_info is not None,
        "zero, copy or const experts": call.virtual_experts > 0,
        "a two-dimensional x_active_mask": mask is not None and len(mask.shape) == 2,
    }


def _unequal_tokens(call: Call, sizes: Sizes) -> dict[str, bool]:
    unequal = call.global_bs not in (0, sizes.tokens * call.ep_world_size)
    return {f"global_bs {call.global_bs}, so unequal Bs": unequal}


def _exclude(call: Call, excluded: dict[str, bool]) -> None:
    for named, given in excluded.items():
        value, rule = f'"{call.comm_alg}" with {named}', f"must not come with {named}"
        require(not given, "comm_alg", value, rule, 'use "" or "fullmesh_v1"')


def _bound(call: Call, quantity: str, number: int, named: str) -> None:
    value = f'"{call.comm_alg}" with {number} {named}'
    call.limits.check(quantity, number, "comm_alg", value, f"takes {{}} {named}", 'use "fullmesh_v1"')


def more_counts(layout: Layout, top_k: int) -> int:
    """Entries of ep_recv_counts that hierarchy needs behind the counts, for which rows a node has (§2.14).

    >>> from evenmoe.contract.layout import make_layout
    >>> more_counts(make_layout(ep=16, rank=0, num_experts=16, num_tokens=8, hidden=32, top_k=3), top_k=3)
    1536
    """
    return 2 * layout.global_bs * top_k * layout.ep // _RANKS_PER_NODE


def check_combine_lengths(call: CombineCall[TensorSpec], layout: Layout) -> None:
    """What combine asks for beyond what it does without hierarchy; of the counts it asks for one k alone."""
    if not is_hierarchy(call):
        return
    check_length("expand_scales", call.expand_scales, layout.capacity, "one weight per row")
    counts = layout.ep_recv_counts_length + more_counts(layout, 1)
    check_length("ep_send_counts", call.ep_send_counts, counts, "with what hierarchy keeps behind the counts")
