"""The two groups of a call: as transports for the caller, as names and numbers for the registered operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from evenmoe.contract.layout import Layout
from evenmoe.contract.limits import resolve_limits
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.ops.registration import of_right_types
from evenmoe.ops.specs import refuse_other_places
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_world import transport_of
from evenmoe.transport.remapped import RemappedTransport
from evenmoe.transport.transport import Transport, find_transport


def group_arguments(ep: Transport, tp: Transport | None) -> dict[str, Any]:
    """The six group arguments of the operators; tp_world_size is 0 without tensor parallelism."""
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
    ep = find_transport("group_ep", attributes["group_ep"], attributes["ep_rank_id"], attributes["ep_world_size"])
    if attributes["tp_world_size"] != 2:
        return ep, None
    return ep, find_transport("group_tp", attributes["group_tp"], attributes["tp_rank_id"], 2)


def active_ranks(ep: Transport, layout: Layout) -> Transport:
    """The group that really exchanges: all of it, or the ranks that a scaled-down world kept (§2.11)."""
    return RemappedTransport(ep, layout.survivors) if layout.survivors else ep


def tp_step(operator: str) -> str:
    """The name under which the tensor-parallel peers agree."""
    return f"tensor-parallel step of {operator}"


def calls_of(
    operator: str, ep: Transport, tp: Transport | None, scaled_down: bool, rows: object
) -> tuple[GroupCall, GroupCall | None]:
    """This rank's parts in a call of dispatch or combine: over the expert-parallel group, and with the TP peer.

    In a scaled-down world the ranks that are gone would not hear of a failure, and the one that fails would wait; so
    nobody is told before the part is narrowed to the ranks that are left.

    Args:
        rows: the tensor to be exchanged, on whose device the groups exchange; anything else if it is what is missing.
    """
    device = rows.device if isinstance(rows, torch.Tensor) and rows.device.type != "meta" else "cpu"
    across = GroupCall(ep, operator, device, heard=not scaled_down)
    if tp is None or tp.world_size != 2:
        return across, None
    return across, GroupCall(tp, tp_step(operator), device)


def in_order(operator: str, across: GroupCall, beside: GroupCall | None) -> tuple[GroupCall | None, GroupCall | None]:
    """The parts of a call in the order of their exchanges."""
    return (across, beside) if operator == "dispatch" else (beside, across)


def group_of(ep: object, group: object) -> object:
    """The expert-parallel group of a public function, which has two names for it.

    Raises:
        ConstraintError: both are given.
    """
    if ep is not None and group is not None:
        raise ConstraintError(
            "group", "given beside `ep`", "names the same group", "pass one of the two, whichever reads better"
        )
    return group if ep is None else ep


@contextmanager
def collective(given: Mapping[str, Any], name: str, exchanged: str, rows: object) -> Iterator[dict[str, Any]]:
    """The arguments of a public function -> those of the registered operator, which is called inside.

    Whatever is raised before the operator has exchanged anything is told to the other ranks.

    Args:
        given: by name; `ep`, `tp`, `group` and `num_experts` are the public functions' own.
        name: of the registered operator.
        exchanged: the operator under whose name the ranks agree.
        rows: what would be exchanged.
    """
    arguments = dict(given)
    ep, tp = arguments.pop("ep"), arguments.pop("tp")
    ep = transport_of(group_of(ep, arguments.pop("group", None)), "ep")
    tp = None if tp is None else transport_of(tp, "tp")
    arguments |= group_arguments(ep, tp)
    parts = calls_of(exchanged, ep, tp, given["elastic_info"] is not None, rows)
    with together(*in_order(exchanged, *parts)):
        arguments["moe_expert_num"] = arguments.pop("num_experts")
        if arguments["moe_expert_num"] is None:
            raise MissingArgumentError(
                "num_experts", None, "must be the number of physical experts", "pass what dispatch was called with"
            )
        arguments["comm_alg"] = "" if arguments["comm_alg"] is None else arguments["comm_alg"]
        arguments["limits"] = resolve_limits(arguments["limits"]).name
        arguments = of_right_types(name, arguments)
        refuse_other_places(arguments)
        yield arguments
