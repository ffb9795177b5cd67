"""What MoeUpdateExpert accepts, and the older MoeEPLBUpdateExpert (specification §1.2, §1.6, §1.7)."""

from __future__ import annotations

from evenmoe.contract.calls import UpdateExpertCall, with_integers
from evenmoe.contract.tensor_spec import (
    TensorSpec,
    check_absent,
    check_dims,
    check_dtype,
    check_dtype_of,
    check_given,
    check_shape,
)
from evenmoe.errors import require

_BY_RANK, _BY_TOKEN = 0, 1
_NEW, _OLD = "update_expert", "eplb_update_expert"
Call = UpdateExpertCall[TensorSpec]


def check_update_expert_call(call: Call) -> None:
    """Checks a call of update expert; of several mistakes the first in the order of §1.7 is raised.

    Raises:
        MissingArgumentError: a null tensor.
        UnsupportedTypeError: a dtype that the operator does not take.
        ConstraintError: everything else.

    A table row can list as many replicas after its count as there are ranks:

    >>> from evenmoe.contract.tensor_spec import TensorSpec
    >>> ids, table = TensorSpec((128, 8), "int32"), TensorSpec((256, 10), "int32")
    >>> check_update_expert_call(UpdateExpertCall(expert_ids=ids, eplb_table=table, local_rank_id=0, world_size=9))
    >>> check_update_expert_call(UpdateExpertCall(expert_ids=ids, eplb_table=table, local_rank_id=0, world_size=8))
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `eplb_table` is int32 (256, 10): it must have 2 to 9 columns, for no rank reaches \
more than world_size 8 replicas; drop the columns behind, or lift this bound of atlas-a3 with limits="unlimited".
    """
    check_wrapper(call)
    call = with_integers(call, ("balance_mode", "world_size", "local_rank_id"))
    check_attributes(call)
    check_dtypes(call)
    check_ids_shape(call)
    check_table_shape(call)
    check_pruning_inputs(call)
    check_output_shapes(call)


def infer_update_expert(expert_ids: TensorSpec, eplb_table: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The two outputs, balanced_expert_ids and balanced_active_mask, from the inputs' specs alone.

    Raises:
        ConstraintError: an input that is not 2-D. Nothing else is looked at (specification §1.7).

    >>> ids, mask = infer_update_expert(TensorSpec((128, 8), "int64"), TensorSpec((56, 5), "int32"))
    >>> print(ids, mask)
    int64 (128, 8) bool (128, 8)
    """
    check_dims("expert_ids", expert_ids, (2,), "(tokens, top_k)")
    check_dims("eplb_table", eplb_table, (2,), "(logical experts, 1 + replicas)")
    return expert_ids, TensorSpec(expert_ids.shape, "bool")


def check_wrapper(call: UpdateExpertCall) -> None:
    """What the aclnn wrapper looks at: null pointers."""
    rule, fix = f'must be "{_NEW}" or "{_OLD}"', f'use "{_NEW}", the newer operator'
    require(call.generation in (_NEW, _OLD), "generation", repr(call.generation), rule, fix)
    check_given("expert_ids", call.expert_ids, "pass the logical experts of every token")
    check_given("eplb_table", call.eplb_table, "pass the table of the layer")
    check_given("balanced_expert_ids", call.balanced_expert_ids, "pass a tensor for this output")
    if not call.old:
        fix = "pass a tensor for this output, also without pruning"
        check_given("balanced_active_mask", call.balanced_active_mask, fix)


def check_attributes(call: UpdateExpertCall) -> None:
    mode, world, rank = call.balance_mode, call.world_size, call.local_rank_id
    by_rank = mode == _BY_RANK
    require(by_rank or not call.old, "balance_mode", mode, f"must be 0 for {_OLD}", f"use {_NEW} for mode 1")
    require(by_rank or mode == _BY_TOKEN, "balance_mode", mode, "must be 0 or 1", "use 0 by rank, 1 by token")
    if by_rank:
        quantity = "old_update_world_size" if call.old else "update_world_size"
        call.limits.check(quantity, world, "world_size", world, "must be {} under balance_mode 0", "use {} ranks")
        rule, fix = f"must be 0 to {world - 1} under balance_mode 0", "pass this rank's number, counted from 0"
        require(0 <= rank < world, "local_rank_id", rank, rule, fix)


def check_dtypes(call: UpdateExpertCall) -> None:
    ids = ("int32",) if call.old else ("int32", "int64")
    check_dtype("expert_ids", call.expert_ids, ids)
    check_dtype("eplb_table", call.eplb_table, ("int32",))
    check_dtype("expert_scales", call.expert_scales, ("float32", "float16", "bfloat16"))
    check_dtype("pruning_threshold", call.pruning_threshold, ("float32",))
    check_dtype("active_mask", call.active_mask, ("bool",))
    check_dtype("balanced_expert_ids", call.balanced_expert_ids, ids)
    check_dtype_of("balanced_expert_ids", call.balanced_expert_ids, call.expert_ids.dtype, "expert_ids'")
    check_dtype("balanced_active_mask", call.balanced_active_mask, ("bool",))


def check_ids_shape(call: UpdateExpertCall) -> None:
    ids = call.expert_ids
    check_dims("expert_ids", ids, (2,), "(tokens, top_k)")
    tokens, top_k = ids.shape
    call.limits.check("tokens", tokens, "expert_ids", ids, "must have {} tokens", "use {} tokens per call and rank")
    call.limits.check("top_k", top_k, "expert_ids", ids, "must have {} columns", "use {} experts per token")


def check_table_shape(call: UpdateExpertCall) -> None:
    """E, and F, which is bounded by a number of the chip in mode 1, by world_size in mode 0."""
    table, ids, world, limits = call.eplb_table, call.expert_ids, call.world_size, call.limits
    check_dims("eplb_table", table, (2,), "(logical experts, 1 + replicas)")
    experts, columns = table.shape
    quantity = "old_logical_experts" if call.old else "logical_experts"
    limits.check(quantity, experts, "eplb_table", table, "must have {} rows", "use {} logical experts")
    rule, fix = f"must have at most {experts} columns, one per expert", "route to each expert once at most"
    require(ids.shape[1] <= experts, "expert_ids", ids, rule, fix)
    if call.balance_mode == _BY_TOKEN:
        rule, fix = "must have {} columns", "use {} columns"
        limits.check("table_columns_by_token", columns, "eplb_table", table, rule, fix)
        return
    rule, fix = "must have at least 2 columns, a count and an id", "give every expert a slot"
    require(columns >= 2, "eplb_table", table, rule, fix)
    rule = f"must have 2 to {world + 1} columns, for no rank reaches more than world_size {world} replicas"
    fix = f'drop the columns behind, or lift this bound of {limits.name} with limits="unlimited"'
    require(columns <= world + 1 or not limits.table_columns_within_world, "eplb_table", table, rule, fix)


def check_pruning_inputs(call: UpdateExpertCall) -> None:
    """Scales and threshold come together, the active mask with them only (§1.7)."""
    scales, threshold, active = call.expert_scales, call.pruning_threshold, call.active_mask
    if call.old:
        for name in ("expert_scales", "pruning_threshold", "active_mask"):
            check_absent(name, getattr(call, name), f"use {_NEW}: {_OLD} does not prune")
        return
    fix = "pass both or neither"
    require(scales is None or threshold is not None, "pruning_threshold", None, "must be given with expert_scales", fix)
    require(threshold is None or scales is not None, "expert_scales", None, "must be given with pruning_threshold", fix)
    rule, fix = "must come with expert_scales and pruning_threshold", "pass it to dispatch as x_active_mask instead"
    require(active is None or scales is not None, "active_mask", active, rule, fix)
    tokens, top_k = call.expert_ids.shape
    check_shape("expert_scales", scales, (tokens, top_k), "one per token and k")
    if isinstance(threshold, TensorSpec):
        known, rule = threshold.shape in ((top_k,), (1, top_k)), f"must be ({top_k},) or (1, {top_k})"
        require(known, "pruning_threshold", threshold, rule, "give it one number per k")
    check_shape("active_mask", active, (tokens,), "one per token")


def check_output_shapes(call: UpdateExpertCall) -> None:
    check_shape("balanced_expert_ids", call.balanced_expert_ids, call.expert_ids.shape, "that of expert_ids")
    if not call.old:
        check_shape("balanced_active_mask", call.balanced_active_mask, call.expert_ids.shape, "that of expert_ids")
