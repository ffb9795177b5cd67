"""`place`: a loaded model of transformers gets the slots of a placement, replicas included."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from evenmoe.errors import ConstraintError, EvenmoeError, RankDisagreementError, UnsupportedTypeError, require
from evenmoe.integrations.transformers.expert_modules import ExpertsOfLayer, experts_of
from evenmoe.integrations.transformers.implementation import EvenmoeExperts, implementation_of
from evenmoe.integrations.transformers.weights import moved
from evenmoe.placement import Placement

IntArray = npt.NDArray[np.int64]


def place(model: nn.Module, placement: Placement, *, named: str = "") -> None:
    """Move the experts of a model to the slots of a placement; a collective of the ranks.

    Weights go from the ranks that hold them to those that lack them, one tensor of one layer at a time. `state_dict`,
    `save_pretrained` and `load_state_dict` go on with the model's own experts, whatever the placement; where
    replicas differ, the first slot of an expert counts. They are collectives then. The experts' parameters are new
    tensors: make an optimizer afterwards.

    Args:
        model: loaded with `DistributedConfig(ep_size=…, ep_implementation="evenmoe")`.
        placement: one layer for each module of experts, in the order of the model's layers, over the `ep_size` ranks,
            which share the slots evenly. The same on every rank. It may follow another placement.
        named: as in `experts_of`.

    Raises:
        UnsupportedTypeError: no Placement.
        ConstraintError: a model that evenmoe does not run, or a placement that does not fit it.
        RankDisagreementError: ranks pass different placements, or one of them refused; on all ranks, nothing moved.
    """
    found = experts_of(model, named)
    error: EvenmoeError | None = None
    try:
        _check(found, placement)
    except EvenmoeError as refused:
        error = refused
    _agree(found, placement, error)
    slots = placement.slot_to_expert.astype(np.int64).reshape(len(found), placement.num_ranks, -1)
    for one, wanted in zip(found, slots, strict=True):
        _place_layer(one.module, implementation_of(one), wanted)


def placement_of(model: nn.Module, *, named: str = "") -> Placement:
    """Return the placement in use.

    Raises:
        ConstraintError: a model that evenmoe does not run.
    """
    running = [implementation_of(one) for one in experts_of(model, named)]
    return Placement(np.stack([one.held.ravel() for one in running]), num_ranks=len(running[0].held))


def _check(found: list[ExpertsOfLayer], placement: object) -> None:
    if not isinstance(placement, Placement):
        what = f"a {type(placement).__name__}"
        raise UnsupportedTypeError("placement", what, "must be a Placement", "make one with evenmoe.plan")
    layers = f"{placement.num_layers} layers"
    rule, fix = f"must have one layer for each of the model's {len(found)}", "plan for the model's own layers"
    require(placement.num_layers == len(found), "placement", layers, rule, fix)
    require(
        placement.is_even,
        "placement",
        f"one with {list(placement.rank_sizes)} slots on the ranks",
        "must give all ranks equally many",
        "plan without rank sizes or dead ranks",
    )
    for one in found:
        running = implementation_of(one)
        ranks, experts = running.ep_mesh.size(), running.num_experts
        rule, fix = f"must be over the {ranks} ranks of the model's ep_size", f"plan with num_ranks={ranks}"
        require(placement.num_ranks == ranks, "placement", f"over {placement.num_ranks} ranks", rule, fix)
        rule, fix = f"must place the {experts} experts of {one.name!r}", "plan for the loads of this model"
        require(placement.num_experts == experts, "placement", f"of {placement.num_experts} experts", rule, fix)
        _check_whole(one)


def _check_whole(one: ExpertsOfLayer) -> None:
    """Refuse experts that their rank does not hold whole, or holds in another form than it computes with."""
    running = implementation_of(one)
    for name, parameter in one.module.named_parameters(recurse=False):
        if not isinstance(parameter, DTensor) or parameter.shape[0] != running.held.size:
            raise ConstraintError(
                "model",
                f"one with {name!r} of {one.name!r}, which is not divided by expert",
                "must have one row for each expert in every parameter of its experts",
                "run this model without replicas",
            )
        if parameter.device_mesh.size() != running.ep_mesh.size():
            raise ConstraintError(
                "model",
                f"one whose experts are divided over {parameter.device_mesh.size()} ranks with an ep_size of "
                f"{running.ep_mesh.size()}",
                "must hold each expert whole on a rank",
                "load it with ep_size=fsdp_size*tp_size and without dp_replicate_size",
            )
    shared = [
        name
        for name, parameter in one.module.named_parameters()
        if "." in name and isinstance(parameter, DTensor) and parameter.device_mesh.size() != 1
    ]
    require(
        not shared,
        "model",
        f"one that divides {shared[:1]} of {one.name!r} over ranks",
        "must hold what its experts share whole on every rank",
        "load it with ep_size=fsdp_size*tp_size and without dp_replicate_size",
    )
    cast = getattr(getattr(_fsdp_state(one.module), "_mp_policy", None), "param_dtype", None)
    require(
        cast is None,
        "model",
        f"one whose experts FSDP casts to {cast} at every step",
        "must hold its experts in the dtype that they compute in",
        "load it with dtype=… and without fsdp_mixed_precision",
    )


def _agree(found: list[ExpertsOfLayer], placement: Placement, error: EvenmoeError | None) -> None:
    """Raise on all ranks if one refuses, or if they differ."""
    running = getattr(found[0].module, "_evenmoe", None)
    if not isinstance(running, EvenmoeExperts):
        assert error is not None
        raise error  # without a group there is nobody to tell
    group = running.ep_mesh.get_group()
    said = str(error) if error else hashlib.sha256(placement.slot_to_expert.tobytes()).digest()
    all_said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_said, said, group=group)
    if error is not None:
        raise error
    rule, fix = "must be accepted by every rank, and the same on all", "read the placement from one file everywhere"
    for rank, other in enumerate(all_said):
        if isinstance(other, str):
            raise RankDisagreementError("placement", f"refused on rank {rank} ({other})", rule, fix)
        if other != all_said[0]:
            raise RankDisagreementError("placement", f"another on rank {rank} than on rank 0", rule, fix)


def _place_layer(experts: nn.Module, running: EvenmoeExperts, wanted: IntArray) -> None:
    """Fetch the weights of the wanted slots, one tensor after the other."""
    _leave_fsdp(experts, running)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        assert isinstance(parameter, DTensor)
        rows = moved(parameter.to_local(), running.held, wanted, running.ep_mesh.get_group())
        new = nn.Parameter(_of_rows(rows, running), parameter.requires_grad)
        if new.requires_grad and running.gradient_divisor != 1.0:
            new.register_hook(partial(_divided, divisor=running.gradient_divisor))
        experts._parameters[name] = new
    if not running.hooked:
        experts.register_state_dict_post_hook(_as_experts)
        experts.register_load_state_dict_pre_hook(_as_slots)
        running.hooked = True
    running.use(wanted)


def _leave_fsdp(experts: nn.Module, running: EvenmoeExperts) -> None:
    """Take the experts' parameters out of FSDP's hands, which hold each whole on one rank and would keep the old ones.

    What FSDP did for them is a division of their gradients, by as many ranks as hold batches of their own.
    """
    state = _fsdp_state(experts)
    groups = getattr(state, "_fsdp_param_groups", None)
    if state is None or not groups:
        return
    assert isinstance(experts, FSDPModule)
    experts.reshard()
    running.gradient_divisor = float(groups[0].gradient_divide_factor or 1.0)
    for group in groups:
        for parameter in group.fsdp_params:
            parameter._post_load_hook_handle.remove()
        group.fsdp_params.clear()  # its hooks stay and hold the group: without this the old weights as well
    groups.clear()
    for child in (child for child in experts.modules() if child is not experts):
        for name, parameter in list(child.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):  # such as a norm that all experts share
                child._parameters[name] = nn.Parameter(parameter.to_local(), parameter.requires_grad)


def _fsdp_state(experts: nn.Module) -> Any:
    return experts._get_fsdp_state() if isinstance(experts, FSDPModule) else None


def _of_rows(rows: torch.Tensor, running: EvenmoeExperts) -> DTensor:
    return DTensor.from_local(rows, running.ep_mesh, [Shard(0)], run_check=False)


def _divided(gradient: torch.Tensor, divisor: float) -> torch.Tensor:
    return gradient / divisor


def _as_experts(experts: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """Put the model's own experts into a state dict, each rank's as transformers loaded them."""
    running, own = _running(experts)
    for name in dict(experts.named_parameters(recurse=False)):
        slots = state_dict.get(prefix + name)
        if isinstance(slots, DTensor):
            rows = moved(slots.to_local(), running.held, own, running.ep_mesh.get_group())
            state_dict[prefix + name] = _of_rows(rows, running)


def _as_slots(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Turn the model's own experts in a state dict into this rank's slots."""
    running, own = _running(experts)
    for name in dict(experts.named_parameters(recurse=False)):
        value = state_dict.get(prefix + name)
        if isinstance(value, DTensor):
            local = value.redistribute(running.ep_mesh, [Shard(0)]).to_local()
            rows = moved(local, own, running.held, running.ep_mesh.get_group())
        elif isinstance(value, torch.Tensor):
            rows = value[running.held[running.ep_mesh.get_local_rank()]]
        else:
            continue
        state_dict[prefix + name] = _of_rows(rows, running)


def _running(experts: nn.Module) -> tuple[EvenmoeExperts, IntArray]:
    """How evenmoe runs the experts, and those that each rank has before any placement."""
    running = implementation_of(ExpertsOfLayer("", 0, experts))
    return running, np.arange(running.num_experts).reshape(running.ep_mesh.size(), -1)
