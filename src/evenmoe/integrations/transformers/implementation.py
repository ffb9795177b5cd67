"""`register`: evenmoe as an `ep_implementation` of transformers' `DistributedConfig`.

transformers makes one implementation for each module of experts and calls it in the place of the module's forward,
with the tokens that this rank holds and logical expert ids (`transformers.distributed.expert_parallel`).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from evenmoe.errors import ConstraintError
from evenmoe.integrations.transformers.expert_modules import ExpertsOfLayer
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.runtime.expert_parallel import ExpertParallel
from evenmoe.runtime.shared_batch import SharedBatch

IntArray = npt.NDArray[np.int64]
# Token-expert assignments of a batch up to which every rank adds up all of its rows. With 4 ranks and 8 experts per
# token both ways cost the same at 600 tokens of hidden size 2048, and at 2,500 of 256.
_FEW = 4096


def register(name: str = "evenmoe", *, rule: str | Rule = "batch", check_values: bool = True) -> None:
    """Make evenmoe an implementation that `DistributedConfig(ep_implementation=name)` finds.

    Args:
        name: how configurations name it; registering a name again replaces what it meant.
        rule: which replica a token uses, as in `ExpertParallel`; without replicas every rule gives the same.
        check_values: look at the router's ids at every step, as in `ExpertParallel`.

    Raises:
        UnknownNameError: there is no such rule.

    Until `place` gives a model another placement, each expert has one slot, on the rank where transformers loads it:

    >>> register()
    >>> from transformers.distributed.expert_parallel import EPImplementationInterface
    >>> "evenmoe" in EPImplementationInterface()
    True
    """
    settings = {"rule": RULES.get(rule), "check_values": check_values}
    EPImplementationInterface.register(name, type("EvenmoeExperts", (EvenmoeExperts,), settings))


class EvenmoeExperts(EPImplementation):
    """Dispatch, the rank's own experts, and combine, for one module of experts.

    Where ranks of a tensor-parallel group hold the same batch, each takes its part of the tokens, and the results are
    gathered; small batches that need no gradients stay whole (`SharedBatch`). `rule` and `check_values` are those of
    `register`.

    Attributes:
        num_experts: E, logical experts of the layer.
        gradient_divisor: what the gradients of placed experts are divided by, as FSDP would.
        hooked: whether the module's state dict is turned into the model's own experts already.
        held: int64 (W, slots per rank), the expert that every slot of every rank holds.
        layer: the `ExpertParallel` that carries the rows; made when it is first used, since transformers builds
            models where no tensor holds values (`meta`).
    """

    rule: Rule
    check_values: bool

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.gradient_divisor, self.hooked = 1.0, False
        self.num_experts = cast(int, self.num_local_experts) * ep_mesh.size()
        self.use(np.arange(self.num_experts).reshape(ep_mesh.size(), -1))
        experts._evenmoe = self  # pyright: ignore[reportArgumentType]

    def use(self, held: IntArray) -> None:
        """Go on with these experts in the slots, which the module's parameters hold already."""
        self.held = held
        self.experts.num_experts = held.shape[1]
        self._layer: ExpertParallel | None = None
        self._batch: SharedBatch | None = None

    @property
    def layer(self) -> ExpertParallel:
        if self._layer is None:
            placement = Placement(self.held.reshape(1, -1), num_ranks=len(self.held), num_experts=self.num_experts)
            self._layer = ExpertParallel(
                self.ep_mesh,
                placement.eplb_table(0),
                num_slots=placement.num_slots,
                rule=self.rule,
                check_values=self.check_values,
            )
        return self._layer

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self._shares(hidden_states, top_k_index, top_k_weights):
            batch = SharedBatch(self.layer) if self._batch is None else self._batch
            self._batch = batch
            shared = batch.select(hidden_states, top_k_index, top_k_weights)
            return batch.combine(shared, self._experts(shared.rows, shared.num_tokens_per_expert))
        num_tokens = len(hidden_states)
        hidden_states, top_k_index, top_k_weights = map(self._own, (hidden_states, top_k_index, top_k_weights))
        sent = self.layer.dispatch(hidden_states, top_k_index, top_k_weights)
        output = self.layer.combine(sent, self._experts(sent.rows, sent.num_tokens_per_expert))
        return self._all(output, num_tokens)

    def _shares(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> bool:
        """Whether every rank computes its experts' part of a batch that all hold, which no gradient may pass."""
        if self.tp_mesh.size() == 1 or not self.shares_batch or top_k_index.numel() > _FEW:
            return False
        return not (torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad))

    def _experts(self, rows: torch.Tensor, per_slot: torch.Tensor) -> torch.Tensor:
        """(R, H), each row through the expert of its slot; rows lie slot by slot."""
        if not len(rows):
            # One row of zeros, dropped again: the experts stay in the graph, so that FSDP reduces their gradients.
            return self._experts(rows.sum(dim=0, keepdim=True), per_slot.new_tensor([1]))[:0]
        slots = torch.repeat_interleave(per_slot, output_size=len(rows))[:, None]
        return self.experts_forward(rows, slots, rows.new_ones((len(rows), 1)))

    def _own(self, of_group: torch.Tensor) -> torch.Tensor:
        """This rank's part of what its tensor-parallel group holds in common."""
        if self.tp_mesh.size() == 1:
            return of_group
        whole = DTensor.from_local(of_group, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _all(self, own: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The results of all tokens of the tensor-parallel group."""
        if self.tp_mesh.size() == 1:
            return own
        shape, stride = torch.Size((num_tokens, own.shape[1])), (own.shape[1], 1)
        return DTensor.from_local(own, self.tp_mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()


def implementation_of(experts: ExpertsOfLayer) -> EvenmoeExperts:
    """How evenmoe runs a module of experts.

    Raises:
        ConstraintError: it does not.
    """
    running = getattr(experts.module, "_evenmoe", None)
    if not isinstance(running, EvenmoeExperts):
        raise ConstraintError(
            "model",
            f"one whose experts {experts.name!r} run without evenmoe",
            "must be loaded with evenmoe as its expert-parallel implementation",
            'call register(), then load it with DistributedConfig(ep_size=…, ep_implementation="evenmoe")',
        )
    return running
