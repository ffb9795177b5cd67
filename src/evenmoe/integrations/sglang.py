"""evenmoe's planner in SGLang: an entry point of `sglang.srt.plugins`, chosen by `--eplb-algorithm evenmoe`.

SGLang hands its windows over, so that plans are made for loads like those recorded and not for their sum. Other
algorithms stay what they are. `SGLANG_PLUGINS`, SGLang's own list of plug-ins to load, leaves it out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from evenmoe.integrations.rebalancing import IntArray, Rebalancing

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
_ALGORITHMS = "sglang.srt.eplb.eplb_algorithms"
NAME = "evenmoe"
DEFAULT = Rebalancing()


def register(rebalancing: Rebalancing = DEFAULT) -> None:
    """Make "evenmoe" an algorithm of SGLang's expert load balancer, in this process.

    Args:
        rebalancing: how it plans.

    Raises:
        ImportError: there is no SGLang here, or one without hooks.
    """
    hooks = import_module("sglang.srt.plugins.hook_registry")

    def rebalance(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("algorithm", arguments[5] if len(arguments) > 5 else None) != NAME:
            return original(*arguments, **keywords)
        keywords.pop("algorithm", None)
        return rebalance_experts(rebalancing, *arguments[:5], **keywords)

    hooks.HookRegistry.register(f"{_ALGORITHMS}.compute_algorithm", choose_algorithm, hooks.HookType.AROUND)
    hooks.HookRegistry.register(f"{_ALGORITHMS}.rebalance_experts", rebalance, hooks.HookType.AROUND)
    _LOG.info("evenmoe plans SGLang's expert placements with --eplb-algorithm evenmoe: %s", rebalancing)


def choose_algorithm(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Around SGLang's `compute_algorithm`: a name that it does not know, "evenmoe", is passed on as it is."""
    raw = keywords.get("raw_algorithm", arguments[0] if arguments else None)
    return NAME if raw == NAME else original(*arguments, **keywords)


def rebalance_experts(
    rebalancing: Rebalancing,
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What SGLang's function of this name returns.

    Args:
        rebalancing: how it plans.
        tokens_per_expert: (T, L, E), windows, on any device.
        num_physical_experts: S. num_local_physical_experts: S / G.
        num_groups, num_nodes: None for no groups.

    Returns:
        int64 on the CPU: (L, S), the expert of every slot; (L, E, X), the slots of every expert in ascending order,
        padded with −1; (L, E), how many they are.
    """
    import torch

    in_use = import_module("sglang.srt.eplb.expert_location").get_global_expert_location_metadata()
    found = rebalancing.next_map(
        tokens_per_expert.cpu().numpy(),
        num_physical_experts,
        num_physical_experts // num_local_physical_experts,
        num_nodes=num_nodes,
        num_groups=num_groups or 1,
        in_use=None if in_use is None else in_use.physical_to_logical_map_cpu.numpy(),
    )
    slots, count = slots_of(found, tokens_per_expert.shape[-1])
    return torch.from_numpy(found), torch.from_numpy(slots), torch.from_numpy(count)


def slots_of(slot_to_expert: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """The slots of every expert, int64 (L, E, X), padded with −1, and their number, (L, E).

    >>> slots, count = slots_of(np.array([[0, 1, 0]]), 2)
    >>> slots.tolist(), count.tolist()
    ([[[0, 2], [1, -1]]], [[2, 1]])
    """
    count = np.stack([np.bincount(layer, minlength=num_experts) for layer in slot_to_expert])
    slots = np.full((*count.shape, count.max()), -1, np.int64)
    order = np.argsort(slot_to_expert, axis=1, kind="stable")
    for layer, own in enumerate(slot_to_expert):
        expert = own[order[layer]]
        first = count[layer].cumsum() - count[layer]
        slots[layer, expert, np.arange(len(own)) - first[expert]] = order[layer]
    return slots, count
