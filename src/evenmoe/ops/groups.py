"""The two groups of a call: as transports for the caller, as names and numbers for the registered operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from evenmoe.contract.layout import Layout
from evenmoe.contract.limits import resolve_limits
from evenmoe.errors import EvenmoeError, MissingArgumentError
from evenmoe.ops.specs import refuse_other_types
from evenmoe.transport import registry
from evenmoe.transport.agreement import refuse
from evenmoe.transport.contract import Transport
from evenmoe.transport.renumbered import RenumberedTransport


def group_arguments(ep: Transport, tp: Transport | None) -> dict[str, Any]:
    """The six group arguments of the operators; tp_world_size is 0 without tensor parallelism."""
    if not isinstance(ep, Transport):
        raise MissingArgumentError(
            "ep", repr(ep), "must be the transport of the expert-parallel group", "pass rank.ep of an open world"
        )
    return {
        "group_ep": ep.name,
        "ep_world_size": ep.world_size,
        "ep_rank_id": ep.rank,
        "group_tp": "" if tp is None else tp.name,
        "tp_world_size": 0 if tp is None else tp.world_size,
        "tp_rank_id": 0 if tp is None else tp.rank,
    }


def find_groups(attributes: Mapping[str, Any]) -> tuple[Transport, Transport | None]:
    """The transports behind the names; no TP transport unless there are two peers."""
    ep = registry.find("group_ep", attributes["group_ep"], attributes["ep_rank_id"], attributes["ep_world_size"])
    if attributes["tp_world_size"] != 2:
        return ep, None
    return ep, registry.find("group_tp", attributes["group_tp"], attributes["tp_rank_id"], 2)


def survivors(ep: Transport, layout: Layout) -> Transport:
    """The group that really exchanges: all of it, or the ranks that a scaled-down world kept (§2.11)."""
    return RenumberedTransport(ep, layout.survivors) if layout.survivors else ep


def tp_step(operator: str) -> str:
    """The name under which the tensor-parallel peers agree."""
    return f"tensor-parallel step of {operator}"


@contextmanager
def refusing_together(rows: torch.Tensor | None, waiting: Sequence[tuple[Transport | None, str]]) -> Iterator[None]:
    """If this rank's call is refused, tell the ranks that would otherwise wait for it.

    Args:
        rows: the tensor to be exchanged, on whose device the groups exchange; None if it is what is missing.
        waiting: (group, operator) of the exchanges still to come, in their order; None for a group there is not.
    """
    try:
        yield
    except EvenmoeError as error:
        for group, operator in waiting:
            if group is not None:
                refuse(group, operator, error, "cpu" if rows is None else rows.device)
        raise


def operator_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a public function -> those of the registered operator: names for groups and limits."""
    arguments = dict(given)
    refuse_other_types(arguments)
    ep, tp = arguments.pop("ep"), arguments.pop("tp")
    arguments |= group_arguments(ep, tp)
    arguments["moe_expert_num"] = arguments.pop("num_experts")
    arguments["comm_alg"] = arguments["comm_alg"] or ""
    arguments["limits"] = resolve_limits(arguments["limits"]).name
    return arguments
