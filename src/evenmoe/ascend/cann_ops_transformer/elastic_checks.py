"""What `ElasticBuffer.dispatch` and `.combine` accept: the checks of the published host code (specification §16).

Shapes: W ranks, Bs tokens, H hidden, K experts per token, A rows received.
"""

from __future__ import annotations

import torch

from evenmoe.ascend.cann_ops_transformer.ep_handle import EPHandle
from evenmoe.contract.tensor_spec import check_dims, check_dtype, check_shape
from evenmoe.errors import MissingArgumentError, require
from evenmoe.ops.operator import check_devices, check_tensors, spec_of

Tensor = torch.Tensor
_FP8 = ("float8_e5m2", "float8_e4m3fn")
_SCALES = ("float32", "float8_e8m0fnu", "uint8")
_MOST_HIDDEN, _MOST_TOP_K, _MOST_EXPERTS = 8192, 32, 2048


def check_cached(do_cpu_sync: object, **others: object) -> None:
    """What must not be given beside a handle, which has it."""
    for name, value in others.items():
        require(value is None, name, "given", "must be None with a handle", "leave it out")
    require(do_cpu_sync in (None, False), "do_cpu_sync", do_cpu_sync, "must be False or None with a handle", "omit it")


def check_new(topk_idx: object, num_experts: object, expert_alignment: object, do_cpu_sync: object) -> None:
    """What must be given without a handle."""
    for name, value in (("topk_idx", topk_idx), ("num_experts", num_experts)):
        if value is None:
            raise MissingArgumentError(name, None, "must be given without a handle", "pass it, or a handle")
    rule, fix = "must be 1 or None", "leave it out"
    require(expert_alignment in (None, 1), "expert_alignment", repr(expert_alignment), rule, fix)
    rule, fix = "must be True, False or None", "pass a bool"
    require(do_cpu_sync in (None, True, False), "do_cpu_sync", repr(do_cpu_sync), rule, fix)


def check_tokens(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    *,
    num_experts: int,
    num_max_tokens_per_rank: int,
    world_size: int,
    hidden: int,
    num_topk: int,
) -> None:
    """The arguments of dispatch; `hidden` and `num_topk` are those of the buffer."""
    check_tensors(x=x, topk_idx=topk_idx, **_given(scales=scales, topk_weights=topk_weights))
    check_devices({"x": x, "topk_idx": topk_idx, "scales": scales, "topk_weights": topk_weights})
    rule = f"must be 2 to {_MOST_EXPERTS}, and a multiple of the {world_size} ranks"
    fits = 2 <= num_experts <= _MOST_EXPERTS and num_experts % world_size == 0
    require(fits, "num_experts", num_experts, rule, "pad the experts if need be")
    most = num_max_tokens_per_rank
    require(most > 0, "num_max_tokens_per_rank", most, "must be positive", "pass the tokens of the fullest rank")
    check_dims("x", spec_of(x), (2,), "(tokens, hidden)")
    check_dims("topk_idx", spec_of(topk_idx), (2,), "(tokens, top_k)")
    tokens, top_k = topk_idx.shape
    require(1 <= len(x) <= most, "x", f"of {len(x)} tokens", f"must have 1 to {most} tokens", "split the batch")
    require(hidden <= _MOST_HIDDEN, "hidden", hidden, f"must be at most {_MOST_HIDDEN}", "split the rows")
    check_shape("x", spec_of(x), (tokens, hidden), "a token per row of topk_idx, of the buffer's hidden size")
    allowed = min(_MOST_TOP_K, num_experts, num_topk)
    rule = f"must have 1 to {allowed} columns: at most {_MOST_TOP_K}, the experts and the buffer's num_topk"
    require(1 <= top_k <= allowed, "topk_idx", f"of {top_k} columns", rule, "use fewer experts per token")
    check_dtype("x", spec_of(x), ("bfloat16", "float16", *_FP8))
    check_dtype("topk_idx", spec_of(topk_idx), ("int32",))
    if topk_weights is not None:
        check_dtype("topk_weights", spec_of(topk_weights), ("float32",))
        check_shape("topk_weights", spec_of(topk_weights), (tokens, top_k), "one per token and k")
    _check_scales(x, scales)
    if topk_idx.numel():
        highest = int(topk_idx.max())
        rule = f"must be below num_experts {num_experts}, or negative for an entry that is not sent"
        require(highest < num_experts, "topk_idx", f"{highest} in places", rule, "pass ids of the experts")


def _check_scales(x: Tensor, scales: Tensor | None) -> None:
    dtype = spec_of(x).dtype
    if scales is None:
        rule, fix = "must come with its scales", "pass (tokens, scales)"
        require(dtype not in _FP8, "x", f"{dtype} alone", rule, fix)
        return
    rule, fix = f"must be {_FP8[0]} or {_FP8[1]} where scales come with it", "pass the tokens alone"
    require(dtype in _FP8, "x", f"{dtype} with scales", rule, fix)
    check_dtype("scales", spec_of(scales), _SCALES)
    if spec_of(scales).dtype == "float32":
        columns, meaning = -(-x.shape[1] // 128), "one per 128 columns"
    else:
        columns, meaning = -(-x.shape[1] // 64) * 2, "one per 32 columns, of an even number"
    check_shape("scales", spec_of(scales), (len(x), columns), meaning)


def check_rows(x: Tensor, topk_weights: Tensor | None, handle: EPHandle, world_size: int) -> int:
    """The arguments of combine; the number of rows that came."""
    check_tensors(x=x, **_given(topk_weights=topk_weights))
    metadata, per_expert, ids = handle.recv_src_metadata, handle.num_recv_tokens_per_expert, handle.topk_idx
    check_devices({"x": x, "recv_src_metadata": metadata, "topk_idx": ids, "topk_weights": topk_weights})
    check_dims("x", spec_of(x), (2,), "(rows, hidden)")
    check_dtype("x", spec_of(x), ("bfloat16", "float16"))
    rule, fix = "must have a row at least, which the published host code asks for", "dispatch with do_cpu_sync=False"
    require(len(x) > 0, "x", "of 0 rows", rule, fix)
    require(
        1 <= x.shape[1] <= _MOST_HIDDEN, "x", f"of width {x.shape[1]}", f"must be 1 to {_MOST_HIDDEN} wide", "split"
    )
    check_shape("recv_src_metadata", spec_of(metadata), (len(x), 4), "four numbers per row of x")
    check_dtype("recv_src_metadata", spec_of(metadata), ("int32",))
    local = handle.num_experts // world_size
    check_shape("num_recv_tokens_per_expert", spec_of(per_expert), (local,), "one per local expert")
    most = world_size * handle.num_max_tokens_per_rank * min(ids.shape[1], local)
    rule = f"must have at most {most} rows, as many as may come"
    require(len(x) <= most, "x", f"of {len(x)} rows", rule, "pass the rows in dispatch's order")
    if topk_weights is not None:
        check_dtype("topk_weights", spec_of(topk_weights), ("float32",))
        check_shape("topk_weights", spec_of(topk_weights), (len(x),), "one per row of x")
    came = int(per_expert.sum())
    rule, fix = f"must be 0 to {len(x)}, the rows of x", "pass the handle that dispatch returned, unchanged"
    require(0 <= came <= len(x), "num_recv_tokens_per_expert", f"{came} in all", rule, fix)
    return came


def _given(**tensors: object) -> dict[str, object]:
    return {name: value for name, value in tensors.items() if value is not None}
