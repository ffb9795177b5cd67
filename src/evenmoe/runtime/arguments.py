"""What `ExpertParallel` accepts, and what it says to the rest."""

from __future__ import annotations

import torch

from evenmoe.errors import ConstraintError, UnsupportedTypeError, require
from evenmoe.ops.operator import check_devices, check_tensors
from evenmoe.runtime.rows import DispatchedRows


def check_dispatch(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Types, devices and shapes of what dispatch is called with.

    Raises:
        ConstraintError, UnsupportedTypeError: they are not those of a batch.
    """
    check_tensors(x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    check_devices({"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights})
    require(x.dim() == 2, "x", f"of shape {tuple(x.shape)}", "must be (tokens, hidden)", "flatten the batch")
    ids, weights = tuple(topk_ids.shape), tuple(topk_weights.shape)
    rule = f"must be (tokens, k) with the {x.shape[0]} tokens of x"
    fits = len(ids) == 2 and ids[0] == x.shape[0] and ids[1] >= 1
    require(fits, "topk_ids", f"of shape {ids}", rule, "pass the router's indices")
    rule = f"must have the shape of topk_ids, {ids}"
    require(weights == ids, "topk_weights", f"of shape {weights}", rule, "pass one weight per index")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise UnsupportedTypeError("topk_ids", topk_ids.dtype, "must be int32 or int64", "convert it")
    check_floats("x", x)
    check_floats("topk_weights", topk_weights)


def check_combine(dispatched: DispatchedRows, expert_out: torch.Tensor, group_name: str, layer: int) -> None:
    """Types, devices and shapes of what combine is called with.

    Raises:
        ConstraintError, UnsupportedTypeError: they are not those of a dispatch of this layer.
    """
    check_tensors(expert_out=expert_out)
    if not isinstance(dispatched, DispatchedRows):
        raise UnsupportedTypeError(
            "dispatched",
            f"a {type(dispatched).__name__}",
            "must be what dispatch returned",
            "keep it until combine",
        )
    if (dispatched.group_name, dispatched.layer) != (group_name, layer):
        raise ConstraintError(
            "dispatched",
            f"of layer {dispatched.layer} on group {dispatched.group_name!r}",
            f"must be of this layer, {layer} on group {group_name!r}",
            "combine with the layer that dispatched",
        )
    if expert_out.dim() != 2 or expert_out.shape[0] != dispatched.rows.shape[0]:
        raise ConstraintError(
            "expert_out",
            f"of shape {tuple(expert_out.shape)}",
            f"must have one row for each of the {dispatched.rows.shape[0]} dispatched rows",
            "apply each slot's expert to its num_tokens_per_expert rows and keep their order",
        )
    check_devices({"dispatched.rows": dispatched.rows, "expert_out": expert_out})
    check_floats("expert_out", expert_out)


def check_floats(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise UnsupportedTypeError(name, tensor.dtype, "must be a float dtype", "convert it")
