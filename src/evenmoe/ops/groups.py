"""The two groups of a call: as transports for the caller, as names and numbers for the registered operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from evenmoe.contract.layout import Layout
from evenmoe.contract.limits import resolve_limits
from evenmoe.errors import EvenmoeError, MissingArgumentError, UnsupportedTypeError
from evenmoe.ops.registration import of_right_types
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
    if tp is not None and not isinstance(tp, Transport):
        raise UnsupportedTypeError(
            "tp", repr(tp), "must be the transport of the tensor-parallel group, or None", "pass rank.tp"
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


def exchanges(
    operator: str, ep: Transport, tp: Transport | None, scaled_down: bool
) -> list[tuple[Transport | None, str]]:
    """(group, operator) of the agreements that a call of dispatch or combine needs, in their order.

    In a scaled-down world the ranks that are gone would not hear a refusal, and the one that refuses would wait.
    """
    across = (None if scaled_down else ep, operator)
    with_peer = (tp if tp is not None and tp.world_size == 2 else None, tp_step(operator))
    return [across, with_peer] if operator == "dispatch" else [with_peer, across]


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


def operator_arguments(given: Mapping[str, Any], name: str, exchanged: str, rows: object) -> dict[str, Any]:
    """The arguments of a public function -> those of the registered operator: names for groups and limits.

    Args:
        given: by name; `ep`, `tp` and `num_experts` are the public functions' own.
        name: of the registered operator.
        exchanged: the operator under whose name the ranks agree.
        rows: what would be exchanged.
    """
    arguments = dict(given)
    ep, tp = arguments.pop("ep"), arguments.pop("tp")
    arguments |= group_arguments(ep, tp)
    waiting = exchanges(exchanged, ep, tp, scaled_down=given["elastic_info"] is not None)
    with refusing_together(rows if isinstance(rows, torch.Tensor) else None, waiting):
        arguments["moe_expert_num"] = arguments.pop("num_experts")
        if arguments["moe_expert_num"] is None:
            raise MissingArgumentError(
                "num_experts", None, "must be the number of physical experts", "pass what dispatch was called with"
            )
        arguments["comm_alg"] = "" if arguments["comm_alg"] is None else arguments["comm_alg"]
        arguments["limits"] = resolve_limits(arguments["limits"]).name
        return of_right_types(name, arguments)
