"""Backend "hccl" of torch.distributed: gloo under another name, and the names of its groups for the operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from evenmoe.ascend.patching import NPU, Replacements, in_effect
from evenmoe.errors import ConstraintError


def get_hccl_comm_name(backend: Any, rankid: int, *, init_comm: bool = True) -> str:
    """The name of the group behind a backend, for `group_ep` and `group_tp`.

    Args:
        backend: what `group._get_backend(torch.device("npu"))` returns.
        rankid: 0 or more, of the group or of the whole world; the chip opens its connection by it.
        init_comm: whether to open it, which has been done here.

    Raises:
        ConstraintError: a negative rank, or a group that was destroyed.
    """
    if rankid < 0:
        raise ConstraintError("rankid", rankid, "must be at least 0", "pass torch.distributed.get_rank()")
    # torch keeps the names of groups, and gives a backend none in its older versions.
    for group, name in vars(distributed_c10d)["_world"].pg_names.items():
        if group._get_backend(torch.device("cpu")) is backend:
            return name
    raise ConstraintError("group", "destroyed", "must be open", "ask for its name before destroy_process_group")


def _without_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, to which the device that a group is bound to is not told: the CPU is none to torch."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device_id")
        if in_effect(NPU) and (getattr(device, "type", "") == "cpu" or isinstance(device, int)):
            kwargs["device_id"] = None
        return function(*args, **kwargs)

    return call


def install(replacements: Replacements) -> None:
    """Let torch.distributed take "hccl"."""
    if not dist.is_available():
        return
    replacements.put(dist.Backend, "HCCL", dist.Backend.GLOO)
    replacements.put(dist, "is_hccl_available", dist.is_gloo_available)
    # A class from which those of all backends derive, and what stands around one in torch's debug mode.
    replacements.put(vars(torch)["_C"]._distributed_c10d.Backend, "get_hccl_comm_name", get_hccl_comm_name)
    for name in ("init_process_group", "new_group"):
        wrapped = _without_device(getattr(distributed_c10d, name))
        replacements.put(distributed_c10d, name, wrapped)
        replacements.put(dist, name, wrapped)
