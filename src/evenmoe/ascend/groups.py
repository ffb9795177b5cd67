"""Groups by name: those of an open world, any group of torch.distributed, and which ranks have begun a call on one."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

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
    transport = None
    with suppress(ConstraintError):
        transport = find_transport(argument, name, rank, world_size)
    if name in _adopted or (transport is None and dist.is_available() and dist.is_initialized()):
        _adopt(name)
        transport = None
    return transport or find_transport(argument, name, rank, world_size)


def find_own_group(argument: str, name: str, world_size: int) -> Transport:
    """The transport of the one rank of a group that is in this process.

    Raises:
        ConstraintError: no such group is open here, its size is another, or it is a local world, whose ranks are all
            in this process.
    """
    here = peers_here(name, world_size)
    if not here or name in _adopted:
        with suppress(ConstraintError):
            find_group(argument, name, 0, world_size)  # which makes a group of torch.distributed known
        here = peers_here(name, world_size)
    if len(here) > 1:
        value, rule = f"{name!r} with {len(here)} ranks in this process", "must have one rank in each process"
        raise ConstraintError(argument, value, rule, "use evenmoe.process_world or torch.distributed")
    return find_transport(argument, name, here[0] if here else 0, world_size)


def peers_here(name: str, world_size: int) -> list[int]:
    """The ranks of a group that live in this process: all of a local world, one of a process group."""
    here = []
    for rank in range(world_size):
        with suppress(ConstraintError):
            find_transport("group", name, rank, world_size)
            here.append(rank)
    return here


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


@dataclass(frozen=True)
class Membership:
    """One rank's part in a group: the group's `name`, its `rank`, and the `members` that can be seen from here."""

    name: str
    rank: int
    members: tuple[int, ...]


_lock = threading.Lock()
_turns: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)  # (group, rank) -> its calls' turn
_begun: dict[str, Counter[int]] = {}  # group -> rank -> collectives begun
_running: dict[tuple[str, int], Sequence[Membership]] = {}  # (group, rank) -> all groups of the call that runs there


@contextmanager
def taking_part(groups: Sequence[Membership]) -> Iterator[None]:
    """A collective over these groups runs in the block.

    A rank's calls on one group take turns, whatever streams they come from: its transport counts one exchange at a
    time. Streams that order them differently on different ranks make the ranks disagree, which is an error on each.
    """
    with _lock:
        turn = _turns[groups[0].name, groups[0].rank] if groups else nullcontext()
    with turn:
        yield from _counted(groups)


def _counted(groups: Sequence[Membership]) -> Iterator[None]:
    with _lock:
        for group in groups:
            _begun.setdefault(group.name, Counter())[group.rank] += 1
            _running[group.name, group.rank] = groups
    try:
        yield
    finally:
        with _lock:
            for group in groups:
                _running.pop((group.name, group.rank), None)
                begun = _begun.get(group.name, Counter())
                if len({begun[member] for member in group.members}) == 1:
                    _begun.pop(group.name, None)  # equal counts tell no more than no counts


def late_ranks(groups: Sequence[Membership]) -> dict[str, list[int]]:
    """The ranks that a running collective waits for, by group: those that have begun fewer collectives than it.

    Where all members of its groups have begun, the wait may be theirs for a member of another group (a tensor-parallel
    peer waits in its own expert-parallel group), so the search goes on from there.

    >>> ep, tp = Membership("ep", 0, (0, 1)), Membership("tp", 0, (0, 1))
    >>> with taking_part([ep, tp]), taking_part([Membership("ep", 1, (0, 1))]):
    ...     late_ranks([ep, tp])
    {'tp': [1]}
    """
    late: dict[str, list[int]] = {}
    seen: set[tuple[str, int]] = set()
    waiting = list(groups)
    with _lock:
        while waiting:
            group = waiting.pop()
            if (group.name, group.rank) in seen:
                continue
            seen.add((group.name, group.rank))
            begun = _begun.get(group.name, Counter())
            behind = [member for member in group.members if begun[member] < begun[group.rank]]
            if behind:
                late[group.name] = behind
            for member in group.members:
                waiting.extend(_running.get((group.name, member), ()))
    return late
