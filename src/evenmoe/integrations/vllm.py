"""evenmoe's planner in vLLM: an entry point of `vllm.general_plugins`, found wherever both are installed.

vLLM has one policy, "default" (0.33), and allows no other name. So the plug-in puts evenmoe's in its place: every
rebalance starts from the map in use and copies few experts. vLLM sums its windows before a policy sees them. Without
`--enable-eplb` nothing changes; `VLLM_PLUGINS`, vLLM's own list of plug-ins to load, leaves it out.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenmoe.integrations.rebalancing import Rebalancing

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
_POLICIES = "vllm.distributed.eplb.policy"
DEFAULT = Rebalancing()


def register(rebalancing: Rebalancing = DEFAULT) -> None:
    """Put evenmoe's planner in the place of vLLM's default policy, in this process.

    vLLM calls it in every process that it starts, possibly more than once. For a budget of copies, call it with one
    from a plug-in of your own, whose name comes after "evenmoe".

    Args:
        rebalancing: how it plans.

    Raises:
        ImportError: there is no vLLM here, or one without policies.
    """
    policies = import_module(_POLICIES)
    if getattr(policies.EPLB_POLICIES["default"], "rebalancing", None) == rebalancing:
        return
    policies.EPLB_POLICIES["default"] = policy(policies.AbstractEplbPolicy, rebalancing)
    _LOG.info("evenmoe plans vLLM's expert placements: %s", rebalancing)


def policy(base: type, rebalancing: Rebalancing) -> Any:
    """A class of vLLM's interface `AbstractEplbPolicy` that plans as `rebalancing` says."""

    def rebalance_experts(
        cls: type,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        import torch

        found = rebalancing.next_map(
            weight.cpu().numpy(),
            num_replicas,
            num_ranks,
            num_nodes=num_nodes,
            num_groups=num_groups,
            in_use=None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy(),
        )
        return torch.from_numpy(found)

    members = {"rebalance_experts": classmethod(rebalance_experts), "rebalancing": rebalancing}
    return type("EvenmoePolicy", (base,), members)
