"""Groups by name for the Ascend faces: those of an open world, and any group of torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d

from evenmoe.errors import ConstraintError
from evenmoe.transport.process_group import ProcessGroupTransport
from evenmoe.transport.transport import Transport, find_transport, register, unregister

_adopted: dict[str, tuple[dist.ProcessGroup, Transport]] = {}  # groups that the user made with torch.distributed


def find_group(argument: str, name: str, rank: int, world_size: int) -> Transport:
    """The transport of one rank of a group, by the group's name.

    Args:
        argument: what the caller calls the name, for the message.
        name: `rank.ep.name` or `rank.tp.name` of an open world, or `group.group_name` of a torch.distributed group.
        rank, world_size: of this process or thread in the group.

    Raises:
        ConstraintError: no such group is open here, or its rank or size is another.
    """
    try:
        transport = find_transport(argument, name, rank, world_size)
    except ConstraintError:
        transport = None
    if name in _adopted or (transport is None and dist.is_available() and dist.is_initialized()):
        _adopt(name)
        transport = None
    return transport or find_transport(argument, name, rank, world_size)


def peers_here(name: str, world_size: int) -> list[int]:
    """The ranks of a group that live in this process: all of a local world, one of a process group."""
    return [rank for rank in range(world_size) if _is_here(name, rank, world_size)]


def _is_here(name: str, rank: int, world_size: int) -> bool:
    try:
        find_transport("group", name, rank, world_size)
    except ConstraintError:
        return False
    return True


def _adopt(name: str) -> None:
    """Make a torch.distributed group known to the registry, or forget one that was destroyed since."""
    try:
        # The lookup that torch's own functional collectives use; there is no public one from a name to its group.
        group = vars(distributed_c10d)["_resolve_process_group"](name)
    except (RuntimeError, LookupError, ValueError):
        group = None
    known, transport = _adopted.get(name, (None, None))
    if known is not None and known is group:
        return
    if transport is not None:
        unregister(transport)
        del _adopted[name]
    if group is not None:
        transport = ProcessGroupTransport(group)
        register(transport)
        _adopted[name] = group, transport
