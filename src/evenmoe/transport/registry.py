"""Transports by group name and rank, so that a registered operator can be given names, as Ascend's operators are."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    from evenmoe.transport.contract import Transport

_transports: dict[tuple[str, int], Transport] = {}
_lock = threading.Lock()


def register(transport: Transport) -> None:
    """Make `transport` known under its group's name and its rank; the ranks of a local world share the name."""
    with _lock:
        _transports[transport.name, transport.rank] = transport


def unregister(transport: Transport) -> None:
    with _lock:
        _transports.pop((transport.name, transport.rank), None)


def find(argument: str, name: str, rank: int, world_size: int) -> Transport:
    """The transport of one rank of a named group.

    Raises:
        ConstraintError: no such group is open here, or it has another size.
    """
    transport = _transports.get((name, rank))
    if transport is None:
        known = sorted({group for group, _ in _transports})
        raise ConstraintError(
            argument,
            f"{name!r} (rank {rank})",
            f"must name an open group that this rank belongs to; open are {known or 'none'}",
            "open a world with evenmoe.local_world or evenmoe.process_world, and use its groups' names",
        )
    if transport.world_size != world_size:
        raise ConstraintError(
            argument,
            f"{name!r} with {transport.world_size} ranks",
            f"must have the {world_size} ranks that the call names",
            "pass the world size of the group",
        )
    return transport
