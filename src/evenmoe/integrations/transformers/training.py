"""`reduce_replica_gradients`: training with replicas is training without."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from evenmoe.integrations.transformers.expert_modules import experts_of
from evenmoe.integrations.transformers.implementation import implementation_of


def reduce_replica_gradients(model: nn.Module, *, named: str = "") -> None:
    """Add up the gradients of each expert's replicas in a placed model; a collective of the ranks.

    Call it after backward and before the optimizer's step. Every replica's gradient becomes the sum over the expert's
    slots, so replicas that were equal stay equal.

    Args:
        model: loaded with `DistributedConfig(ep_size=…, ep_implementation="evenmoe")`, with or without a placement.
        named: as in `experts_of`.

    Raises:
        ConstraintError: a model that evenmoe does not run.
        RankDisagreementError, LostRankError: as in `ExpertParallel.reduce_replica_gradients`.
    """
    for one in experts_of(model, named):
        running = implementation_of(one)
        parameters = list(one.module.parameters(recurse=False))
        own = [_own(parameter) for parameter in parameters]
        running.layer.reduce_replica_gradients(own)
        for parameter, rows in zip(parameters, own, strict=True):
            if parameter.grad is None and rows.grad is not None:  # only ranks of other replicas had tokens
                parameter.grad = DTensor.from_local(rows.grad, running.ep_mesh, [Shard(0)], run_check=False)


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter, whose gradient shares the parameter's memory."""
    assert isinstance(parameter, DTensor)
    rows = parameter.to_local().detach().requires_grad_()
    if isinstance(parameter.grad, DTensor):
        rows.grad = parameter.grad.to_local()
    return rows
